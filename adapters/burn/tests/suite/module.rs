use crate::common::{assert_close, numbers};
use burn::config::Config;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::attention::{MhaInput, MultiHeadAttentionConfig, generate_autoregressive_mask};
use burn::optim::{AdamConfig, GradientsParams};
use burn::store::ModuleRecord;
use burn::tensor::{Bool, DType, Device, Distribution, Tensor, TensorData, s};
use dijiang_burn::{AttentionInput, DijiangAttention, DijiangAttentionConfig, Kernel};

pub const D_MODEL: usize = 24;

fn kernels() -> [Kernel; 5] {
    [
        Kernel::Softmax,
        Kernel::Dct { features: 16 },
        Kernel::Performer { features: 16 },
        Kernel::Hedgehog,
        Kernel::Hybrid { window: 6, merged: 4 },
    ]
}

pub fn config(kernel: Kernel) -> DijiangAttentionConfig {
    DijiangAttentionConfig::new(D_MODEL, 4).with_n_kv_heads(Some(2)).with_kernel(kernel)
}

pub fn random(n: usize, device: &Device) -> Tensor<3> {
    Tensor::random([2, n, D_MODEL], Distribution::Normal(0.0, 1.0), device)
}

pub fn causal(attention: &DijiangAttention, x: Tensor<3>) -> Tensor<3> {
    attention.forward(AttentionInput::self_attn(x).causal()).context
}

/// True from a token of each sequence on.
fn padding(lengths: &[usize], n: usize, device: &Device) -> Tensor<2, Bool> {
    let is_pad = lengths.iter().flat_map(|&length| (0..n).map(move |t| t >= length));
    let is_pad: Vec<bool> = is_pad.collect();
    Tensor::from_data(TensorData::new(is_pad, [lengths.len(), n]), device)
}

#[test]
fn softmax_takes_the_place_of_the_module_of_burn() {
    let device = Device::flex().autodiff();
    for is_quiet in [false, true] {
        let theirs = MultiHeadAttentionConfig::new(D_MODEL, 4)
            .with_dropout(0.0)
            .with_quiet_softmax(is_quiet)
            .init(&device);
        let ours = DijiangAttentionConfig::new(D_MODEL, 4).with_quiet_softmax(is_quiet);
        let ours = ours.init(&device).load_record(theirs.clone().into_record());
        let (x, y) = (random(9, &device).require_grad(), random(7, &device).require_grad());
        let pads = padding(&[7, 3], 7, &device);
        for (a, b) in [
            (
                MhaInput::new(x.clone(), y.clone(), y.clone()).mask_pad(pads.clone()),
                AttentionInput::new(x.clone(), y.clone(), y.clone()).mask_pad(pads),
            ),
            {
                let mask = generate_autoregressive_mask(2, 9, &device);
                let ours = AttentionInput::self_attn(x.clone()).mask_attn(mask.clone());
                (MhaInput::self_attn(x.clone()).mask_attn(mask), ours)
            },
        ] {
            let (expected, found) = (theirs.forward(a).context, ours.forward(b).context);
            assert_close(found.clone(), expected.clone(), 1e-5);
            let [found, expected] = [found, expected].map(|x| x.powi_scalar(2).sum().backward());
            assert_close(x.grad(&found).unwrap(), x.grad(&expected).unwrap(), 1e-4);
            let [found, expected] = [(&found, &ours.key), (&expected, &theirs.key)]
                .map(|(gradients, linear)| linear.weight.val().grad(gradients).unwrap());
            assert_close(found, expected, 1e-4);
        }
    }
}

#[test]
fn records_of_the_module_of_burn_leave_the_kernels_as_they_are() {
    let device = Device::flex();
    let record = MultiHeadAttentionConfig::new(D_MODEL, 4).init(&device).into_record();
    let config = DijiangAttentionConfig::new(D_MODEL, 4);
    let model = config.with_kernel(Kernel::Performer { features: 8 }).init(&device);
    assert!(model.clone().try_load_record(record.clone()).is_err());
    let loaded = model.clone().load_record(record.allow_partial(true));
    let [before, after] = [&model, &loaded].map(|x| x.kernel.tensors().to_arrays::<f32>());
    assert_eq!(before, after);
    assert_ne!(numbers(loaded.query.weight.val()), numbers(model.query.weight.val()));
}

#[test]
fn weights_may_pass_zero() {
    struct Negate;
    impl ModuleMapper for Negate {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if D == 1 { param.map(|x| -x) } else { param }
        }
    }
    let device = Device::flex();
    let model = config(Kernel::Performer { features: 16 }).init(&device);
    let x = random(8, &device);
    let expected = numbers(causal(&model, x.clone()));
    let mut negative = model.clone();
    negative.kernel = negative.kernel.map(&mut Negate);
    assert_eq!(numbers(causal(&negative, x.clone())), expected);
    let mut state = negative.state(2).unwrap();
    let out = negative.forward_state(x.clone(), &mut state).context;
    assert_close(out, causal(&model, x), 1e-5);
}

#[test]
fn records_hold_the_kernels() {
    let device = Device::flex();
    for kernel in kernels() {
        let first = config(kernel.clone()).init(&device);
        // other numbers than a new module has
        let first = first.map(&mut Halve);
        let bytes = first.clone().into_record().into_bytes().unwrap();
        let second = config(kernel).init(&device);
        let x = random(12, &device);
        let expected = numbers(causal(&first, x.clone()));
        assert_ne!(numbers(causal(&second, x.clone())), expected);
        let second = second.load_record(ModuleRecord::from_bytes(bytes).unwrap());
        assert_eq!(numbers(causal(&second, x)), expected);
    }
}

pub struct Halve;

impl ModuleMapper for Halve {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|x| x * 0.5)
    }
}

#[test]
fn parameters_have_the_names_of_the_core() {
    #[derive(Default)]
    struct Names(Vec<String>, Vec<String>);
    impl ModuleVisitor for Names {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
            self.1.push(self.0.join("."));
        }
    }
    let module = config(Kernel::Dct { features: 16 }).init(&Device::flex());
    let mut names = Names::default();
    module.visit(&mut names);
    let names: Vec<_> = names.1.into_iter().filter(|name| name.starts_with("kernel")).collect();
    // one kernel for each of two kv heads
    let expected = ["0.map.radii", "0.map.weights", "2.map.radii", "2.map.weights"];
    assert_eq!(names, expected.map(|name| format!("kernel.heads.{name}")));
    let linear = 2 * (24 * 24 + 24) + 2 * (24 * 12 + 12);
    assert_eq!(module.num_params(), linear + module.kernel.num_params());
    assert!(module.kernel.num_params() > 0);
    let fixed = config(Kernel::Dct { features: 16 }).with_train_kernel(false);
    assert_eq!(fixed.init(&Device::flex()).num_params(), linear);
    assert!(format!("{module}").contains("n_kv_heads: 2"), "{module}");
}

#[test]
fn optimizers_train_the_kernels() {
    let device = Device::flex().autodiff();
    for kernel in kernels() {
        let mut model = config(kernel.clone()).init(&device);
        let before = model.kernel.tensors().to_arrays::<f32>();
        let mut optimizer = AdamConfig::new().init();
        let (x, target) = (random(12, &device), random(12, &device));
        let mut losses = Vec::new();
        for _ in 0..20 {
            let loss = (causal(&model, x.clone()) - target.clone()).powi_scalar(2).mean();
            losses.push(loss.clone().into_scalar::<f32>());
            let gradients = GradientsParams::from_grads(loss.backward(), &model);
            model = optimizer.step(1e-2, model, gradients);
        }
        assert!(losses[19] < 0.9 * losses[0], "{kernel:?}: {losses:?}");
        let after = model.kernel.tensors().to_arrays::<f32>();
        for (name, array) in before.iter() {
            assert_ne!(after.get(name).unwrap(), array, "{name}");
        }
    }
}

#[test]
fn states_go_on_where_a_pass_ends() {
    let device = Device::flex().autodiff();
    for kernel in kernels() {
        let model = config(kernel.clone()).init(&device).map(&mut Halve).valid();
        let x = random(12, &device.clone().without_autodiff());
        let whole = causal(&model, x.clone());
        let mut state = model.state(2).unwrap();
        let first = x.clone().slice(s![.., ..5, ..]);
        let mut outs = vec![model.forward_state(first, &mut state).context];
        outs.extend(
            (5..12).map(|t| {
                model.forward_state(x.clone().slice(s![.., t..=t, ..]), &mut state).context
            }),
        );
        assert_close(Tensor::cat(outs, 1), whole, 2e-5);
    }
}

#[test]
fn prompts_of_several_lengths() {
    let device = Device::flex();
    for kernel in kernels() {
        let model = config(kernel).init(&device);
        let x = random(9, &device);
        let mask = padding(&[9, 5], 9, &device);
        let input = AttentionInput::self_attn(x.clone()).causal().mask_pad(mask);
        let expected = model.forward(input).context;
        let mut state = model.state(2).unwrap();
        let found = model.forward_state_padded(x, &[9, 5], &mut state).context;
        assert_close(found, expected, 2e-5);
        assert_eq!(state.lengths(), [9, 5]);
    }
}

#[test]
fn the_same_mask_in_two_ways() {
    let device = Device::flex();
    let model = config(Kernel::Hedgehog).init(&device);
    let x = random(8, &device);
    let mask = generate_autoregressive_mask(2, 8, &device);
    let by_mask = model.forward(AttentionInput::self_attn(x.clone()).mask_attn(mask)).context;
    assert_eq!(numbers(by_mask), numbers(causal(&model, x)));
}

#[test]
fn configurations_are_saved() {
    let config = config(Kernel::Hybrid { window: 6, merged: 4 }).with_seed(7);
    let file = std::env::temp_dir().join(format!("dijiang-burn-{}.json", std::process::id()));
    config.save(&file).unwrap();
    let loaded = DijiangAttentionConfig::load(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert_eq!(loaded.to_string(), config.to_string());
    assert_eq!((loaded.kernel, loaded.seed), (config.kernel, 7));
}

#[test]
fn configurations_that_do_not_fit() {
    let device = Device::flex();
    let new = DijiangAttentionConfig::new;
    for (config, expected) in [
        (new(24, 5), "`n_heads`"),
        (new(24, 0), "`n_heads`"),
        (new(24, 4).with_n_kv_heads(Some(3)), "`kv_heads`"),
        (new(24, 4).with_kernel(Kernel::Dct { features: 0 }), "`num_features`"),
        (new(24, 4).with_kernel(Kernel::Hedgehog).with_quiet_softmax(true), "quiet softmax"),
    ] {
        let error = config.try_init(&device).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
#[should_panic(expected = "`q` is F64, the layer is F32")]
fn modules_are_f32() {
    let device = Device::flex();
    struct ToF64;
    impl ModuleMapper for ToF64 {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|x| x.cast(DType::F64))
        }
    }
    let model = config(Kernel::Softmax).init(&device).map(&mut ToF64);
    let _ = causal(&model, random(8, &device).cast(DType::F64));
}
