//! The keys of a header that say how a model computes: each is used, says nothing of the forward
//! pass, or must have the value at which nothing changes. Keys that are not in the table are no
//! reason to refuse a file.

use anyhow::{Result, bail, ensure};
use candle_core::quantized::gguf_file::Value;
use std::collections::HashMap;

/// What a key holds.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// One whole number that is not negative.
    Count,
    /// One number of floating point.
    Number,
    /// True or false.
    Flag,
    /// Text.
    Name,
    /// A count, a number, a flag, or a list of them: one for each layer.
    Any,
}

/// What is done with a key.
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// The model is made with it.
    Used,
    /// It says nothing of the forward pass.
    Idle,
    /// Only these values leave the forward pass as it is (flags are 0 and 1); the sentence says
    /// what any other changes.
    Only(&'static [f64], &'static str),
    /// Only these names do.
    Named(&'static [&'static str], &'static str),
}

use Kind::{Any, Count, Flag, Name, Number};
use Rule::{Idle, Named, Only, Used};

const EXPERTS: Rule = Only(&[0.0], "mixtures of experts are not supported");
const LOW_RANK: Rule =
    Only(&[0.0], "its queries, keys or values are products of low rank, which are not supported");
const RECURRENT: Rule = Only(&[0.0], "layers without attention are not supported");
const OTHER: Rule = Only(&[0.0], "that part of other architectures is not supported");
const YARN: &str = "that part of YaRN's scaling of positions is not supported";

/// The keys, without the name of the architecture before them.
const KEYS: &[(&str, Kind, Rule)] = &[
    // sizes
    ("block_count", Count, Used),
    ("context_length", Count, Used),
    ("embedding_length", Count, Used),
    ("feed_forward_length", Count, Used),
    ("attention.head_count", Count, Used),
    ("attention.head_count_kv", Count, Used),
    ("attention.key_length", Count, Used),
    ("attention.value_length", Count, Used),
    ("vocab_size", Count, Idle),
    ("embedding_length_out", Count, OTHER),
    ("embedding_length_per_layer_input", Count, OTHER),
    ("features_length", Count, OTHER),
    // norms
    ("attention.layer_norm_rms_epsilon", Number, Used),
    // beside the other it is not read: see `check`
    ("attention.layer_norm_epsilon", Number, Idle),
    ("attention.group_norm_epsilon", Number, OTHER),
    ("attention.group_norm_groups", Count, OTHER),
    ("swin_norm", Flag, OTHER),
    // factors and caps
    ("embedding_scale", Number, Used),
    ("residual_scale", Number, Used),
    (
        "logit_scale",
        Number,
        Only(&[0.0, 1.0], "some architectures multiply its scores of tokens by it, some divide"),
    ),
    (
        "final_logit_softcapping",
        Number,
        Only(&[0.0], "its scores of tokens are capped, which this program does not do"),
    ),
    ("attention.scale", Number, Used),
    (
        "attn_logit_softcapping",
        Number,
        Only(&[0.0], "the scores of its attention are capped, which this program does not do"),
    ),
    ("router_logit_softcapping", Number, EXPERTS),
    (
        "attention.clamp_kqv",
        Number,
        Only(&[0.0], "its queries, keys and values are clamped, which is not supported"),
    ),
    (
        "attention.output_scale",
        Number,
        Only(&[0.0, 1.0], "the output of its attention is scaled, which is not supported"),
    ),
    (
        "attention.value_scale",
        Number,
        Only(&[0.0, 1.0], "its values are scaled, which is not supported"),
    ),
    ("swiglu_clamp_exp", Any, EXPERTS),
    ("swiglu_clamp_shexp", Any, EXPERTS),
    ("activation_sparsity_scale", Any, OTHER),
    ("rescale_every_n_layers", Count, RECURRENT),
    // what attention sees
    (
        "attention.causal",
        Flag,
        Only(&[1.0], "its tokens see those that follow, so it foretells no next token"),
    ),
    (
        "attention.sliding_window",
        Count,
        Only(
            &[0.0],
            "its attention sees a window of that many tokens; the exact attention here sees all",
        ),
    ),
    (
        "attention.sliding_window_pattern",
        Any,
        Only(&[0.0], "some of its layers see only a window of tokens; here all see everything"),
    ),
    ("attention.key_length_swa", Count, Idle),
    ("attention.value_length_swa", Count, Idle),
    (
        "attention.max_alibi_bias",
        Number,
        Only(&[0.0], "its scores fall with the distance (ALiBi), which is not supported"),
    ),
    (
        "attention.relative_buckets_count",
        Count,
        Only(&[0.0], "its scores have biases by distance, which are not supported"),
    ),
    (
        "attention.temperature_length",
        Count,
        Only(&[0.0], "its scores are scaled by position, which is not supported"),
    ),
    (
        "attention.temperature_scale",
        Number,
        Only(&[0.0], "its scores are scaled by position, which is not supported"),
    ),
    (
        "attention.shared_kv_layers",
        Count,
        Only(&[0.0], "some of its layers share keys and values, which is not supported"),
    ),
    ("attention.q_lora_rank", Count, LOW_RANK),
    ("attention.kv_lora_rank", Count, LOW_RANK),
    ("attention.key_length_mla", Count, LOW_RANK),
    ("attention.value_length_mla", Count, LOW_RANK),
    ("attention.decay_lora_rank", Count, RECURRENT),
    ("attention.iclr_lora_rank", Count, RECURRENT),
    ("attention.value_residual_mix_lora_rank", Count, RECURRENT),
    ("attention.gate_lora_rank", Count, RECURRENT),
    ("attention.recurrent_layers", Any, RECURRENT),
    ("attention.indexer.head_count", Count, OTHER),
    ("attention.indexer.key_length", Count, OTHER),
    ("attention.indexer.top_k", Count, OTHER),
    ("full_attention_interval", Count, RECURRENT),
    // positions
    ("rope.dimension_count", Count, Used),
    ("rope.freq_base", Number, Used),
    ("rope.scale_linear", Number, Used),
    ("rope.scaling.type", Name, Used),
    ("rope.scaling.factor", Number, Used),
    (
        "rope.scaling.attn_factor",
        Number,
        Only(
            &[1.0],
            "its queries and keys are scaled with their positions, which is not supported",
        ),
    ),
    (
        "rope.scaling.alpha",
        Number,
        Only(&[0.0, 1.0], "the base of its positions is scaled, which is not supported"),
    ),
    ("rope.scaling.yarn_ext_factor", Number, Only(&[0.0, -1.0], YARN)),
    ("rope.scaling.yarn_attn_factor", Number, Only(&[1.0, -1.0], YARN)),
    ("rope.scaling.yarn_log_multiplier", Number, Only(&[0.0], YARN)),
    // they mean something to YaRN and LongRoPE only, whose type is refused
    ("rope.scaling.yarn_beta_fast", Number, Idle),
    ("rope.scaling.yarn_beta_slow", Number, Idle),
    ("rope.scaling.original_context_length", Count, Idle),
    ("rope.scaling.finetuned", Flag, Idle),
    (
        "rope.dimension_sections",
        Any,
        Only(&[0.0], "its positions have several axes, which are not supported"),
    ),
    // of layers with a window, which are refused
    ("rope.dimension_count_swa", Count, Idle),
    ("rope.freq_base_swa", Number, Idle),
    // layers
    (
        "use_parallel_residual",
        Flag,
        Only(&[0.0], "its attention and feed-forward network run side by side, not one by one"),
    ),
    ("hidden_act", Name, Named(&["silu", "swish", "swiglu"], "only SiLU is supported")),
    ("hidden_activation", Name, Named(&["silu", "swish", "swiglu"], "only SiLU is supported")),
    ("expert_count", Count, EXPERTS),
    ("expert_used_count", Count, EXPERTS),
    ("expert_shared_count", Count, EXPERTS),
    ("expert_group_count", Count, EXPERTS),
    ("expert_group_used_count", Count, EXPERTS),
    ("expert_feed_forward_length", Any, EXPERTS),
    ("expert_shared_feed_forward_length", Any, EXPERTS),
    ("expert_chunk_feed_forward_length", Any, EXPERTS),
    ("expert_weights_scale", Number, EXPERTS),
    ("expert_weights_norm", Flag, EXPERTS),
    ("expert_gating_func", Count, EXPERTS),
    ("expert_group_scale", Number, EXPERTS),
    ("experts_per_group", Count, EXPERTS),
    ("moe_every_n_layers", Count, EXPERTS),
    ("moe_latent_size", Count, EXPERTS),
    ("interleave_moe_layer_step", Count, EXPERTS),
    ("leading_dense_block_count", Count, EXPERTS),
    ("nextn_predict_layers", Count, OTHER),
    ("n_deepstack_layers", Count, OTHER),
    ("decoder_block_count", Count, OTHER),
    ("altup.active_idx", Count, OTHER),
    ("altup.num_inputs", Count, OTHER),
    ("time_mix_extra_dim", Count, RECURRENT),
    ("time_decay_extra_dim", Count, RECURRENT),
    ("token_shift_count", Count, RECURRENT),
    ("ssm.conv_kernel", Count, RECURRENT),
    ("ssm.inner_size", Count, RECURRENT),
    ("ssm.state_size", Count, RECURRENT),
    ("ssm.time_step_rank", Count, RECURRENT),
    ("ssm.group_count", Count, RECURRENT),
    ("ssm.dt_b_c_rms", Flag, RECURRENT),
    ("kda.head_dim", Count, RECURRENT),
    ("wkv.head_size", Count, RECURRENT),
    ("shortconv.l_cache", Count, RECURRENT),
    ("posnet.block_count", Count, OTHER),
    ("convnext.block_count", Count, OTHER),
    // about a use, or the file
    ("pooling_type", Count, Idle),
    ("decoder_start_token_id", Count, Idle),
    ("tensor_data_layout", Name, Idle),
];

/// Refuses a header with a key that changes the model in a way that is not supported, or a key of
/// another type than it has.
pub(super) fn check(metadata: &HashMap<String, Value>, architecture: &str) -> Result<()> {
    for &(key, kind, rule) in KEYS {
        let key = format!("{architecture}.{key}");
        let Some(value) = metadata.get(&key) else { continue };
        kind.check(&key, value)?;
        let (idle, why) = match rule {
            Used | Idle => continue,
            Only(values, why) => (numbers(value).iter().all(|x| values.contains(x)), why),
            Named(names, why) => {
                (matches!(value, Value::String(name) if names.contains(&name.as_str())), why)
            }
        };
        ensure!(idle, "`{key}` is {}: {why}", shown(value));
    }
    let (mean, rms) = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon");
    let of = |key| metadata.get(&format!("{architecture}.{key}"));
    if let (Some(value), None) = (of(mean), of(rms)) {
        bail!(
            "`{architecture}.{mean}` is {} and there is no `{architecture}.{rms}`: its norms take \
             the mean away (LayerNorm), which is not supported",
            shown(value)
        );
    }
    Ok(())
}

impl Kind {
    fn check(self, key: &str, value: &Value) -> Result<()> {
        let (fits, expected) = match self {
            Count => (count(value).is_some(), "a single count"),
            Number => (matches!(value, Value::F32(_) | Value::F64(_)), "a number"),
            Flag => (matches!(value, Value::Bool(_)), "true or false"),
            Name => (matches!(value, Value::String(_)), "a name"),
            Any => (!numbers(value).iter().any(|x| x.is_nan()), "a number or a list of numbers"),
        };
        ensure!(fits, "`{key}` is {}: {expected} was expected", shown(value));
        Ok(())
    }
}

/// A whole number that is not negative, of any of the types for them, below 2³².
pub(super) fn count(value: &Value) -> Option<u32> {
    match *value {
        Value::U8(x) => Some(x.into()),
        Value::U16(x) => Some(x.into()),
        Value::U32(x) => Some(x),
        Value::U64(x) => x.try_into().ok(),
        Value::I8(x) => x.try_into().ok(),
        Value::I16(x) => x.try_into().ok(),
        Value::I32(x) => x.try_into().ok(),
        Value::I64(x) => x.try_into().ok(),
        _ => None,
    }
}

/// The numbers of a value, flags as 0 and 1; NaN is what is no number.
fn numbers(value: &Value) -> Vec<f64> {
    let number = |value: &Value| match *value {
        Value::U8(x) => x.into(),
        Value::I8(x) => x.into(),
        Value::U16(x) => x.into(),
        Value::I16(x) => x.into(),
        Value::U32(x) => x.into(),
        Value::I32(x) => x.into(),
        Value::U64(x) => x as f64,
        Value::I64(x) => x as f64,
        Value::F32(x) => x.into(),
        Value::F64(x) => x,
        Value::Bool(x) => f64::from(u8::from(x)),
        Value::String(_) | Value::Array(_) => f64::NAN,
    };
    match value {
        Value::Array(list) => list.iter().map(number).collect(),
        one => vec![number(one)],
    }
}

/// A value as a person would write it; of long ones the beginning.
pub(super) fn shown(value: &Value) -> String {
    const MOST: usize = 8;
    match value {
        Value::U8(x) => x.to_string(),
        Value::I8(x) => x.to_string(),
        Value::U16(x) => x.to_string(),
        Value::I16(x) => x.to_string(),
        Value::U32(x) => x.to_string(),
        Value::I32(x) => x.to_string(),
        Value::U64(x) => x.to_string(),
        Value::I64(x) => x.to_string(),
        Value::F32(x) => format!("{x:?}"),
        Value::F64(x) => format!("{x:?}"),
        Value::Bool(x) => x.to_string(),
        Value::String(x) if x.chars().count() > 80 => {
            format!("{:?} and more", x.chars().take(80).collect::<String>())
        }
        Value::String(x) => format!("{x:?}"),
        Value::Array(list) => {
            let more = if list.len() > MOST { ", ..." } else { "" };
            let first: Vec<String> = list.iter().take(MOST).map(shown).collect();
            format!("[{}{more}]", first.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_is_in_the_table_twice() {
        let mut names: Vec<&str> = KEYS.iter().map(|(name, _, _)| *name).collect();
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    /// Every row of the table, with values that it takes and values that it does not.
    #[test]
    fn every_key_takes_its_own_values_only() {
        let says = |key: &str, value: Value| {
            let key = format!("llama.{key}");
            let rms = ("llama.attention.layer_norm_rms_epsilon".to_owned(), Value::F32(1e-5));
            let header = [rms, (key, value)].into_iter().collect();
            check(&header, "llama").err().map(|error| error.to_string())
        };
        let of = |kind: Kind, x: f64| match kind {
            Count => Value::U32(x as u32),
            Number | Any => Value::F32(x as f32),
            Flag => Value::Bool(x != 0.0),
            Name => Value::String("silu".to_owned()),
        };
        for &(key, kind, rule) in KEYS {
            let name = format!("`llama.{key}` is ");
            let error = says(key, Value::Array(vec![Value::String("a".to_owned())])).unwrap();
            assert!(error.contains(&name) && error.contains("was expected"), "{error}");
            match rule {
                Used | Idle => {
                    for x in [0.0, 1.0, 7.0] {
                        assert_eq!(says(key, of(kind, x)), None, "{key}");
                    }
                }
                Only(values, why) => {
                    for &x in values {
                        assert_eq!(says(key, of(kind, x)), None, "{key} = {x}");
                    }
                    // a flag has two values
                    let all: &[f64] =
                        if matches!(kind, Flag) { &[0.0, 1.0] } else { &[0.0, 1.0, 7.0] };
                    for &x in all.iter().filter(|x| !values.contains(x)) {
                        let error = says(key, of(kind, x)).unwrap();
                        let value = shown(&of(kind, x));
                        assert_eq!(error, format!("{name}{value}: {why}"));
                    }
                }
                Named(names, why) => {
                    assert_eq!(says(key, Value::String(names[0].to_owned())), None);
                    let error = says(key, Value::String("gelu".to_owned())).unwrap();
                    assert_eq!(error, format!("{name}\"gelu\": {why}"));
                }
            }
        }
        assert_eq!(says("no_such_key", Value::U32(1)), None);
        assert_eq!(says("no_such_key", Value::String("x".to_owned())), None);
    }

    #[test]
    fn a_norm_with_a_mean_is_refused() {
        let header = [("llama.attention.layer_norm_epsilon".to_owned(), Value::F32(1e-6))];
        let error = check(&header.into_iter().collect(), "llama").unwrap_err().to_string();
        assert!(error.contains("`llama.attention.layer_norm_epsilon` is 1e-6"), "{error}");
        assert!(error.contains("LayerNorm"), "{error}");
    }

    #[test]
    fn lists_of_layers_are_neutral_where_every_layer_is() {
        let check = |list: Vec<Value>| {
            let key = "llama.attention.sliding_window_pattern".to_owned();
            check(&[(key, Value::Array(list))].into_iter().collect(), "llama")
        };
        check(vec![Value::Bool(false); 3]).unwrap();
        check(vec![Value::U32(0); 3]).unwrap();
        let error = check(vec![Value::Bool(false), Value::Bool(true)]).unwrap_err().to_string();
        assert!(error.contains("sliding_window_pattern` is [false, true]"), "{error}");
        let error = check(vec![Value::Bool(true); 30]).unwrap_err().to_string();
        assert!(error.contains("true, ...]"), "{error}");
    }
}
