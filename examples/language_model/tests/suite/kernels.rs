//! Kernels by name, the choice of exact heads, plans in files.

use crate::common::{Sizes, logits, session, softmax, tokens};
use dijiang::{Attention, Head, Mask, MultiHead, SoftmaxAttention};
use language_model::capture::Capture;
use language_model::kernels::{Exact, Kernel, state_bytes};
use language_model::model::Config;
use language_model::plan::Plan;
use language_model::session::Session;
use ndarray::{Array3, s};
use serde_json::{Value, json};
use std::fs;
use std::sync::Arc;

fn tiny() -> (Session, crate::common::Written) {
    session(&Sizes { seed: 60, layers: 3, ..Sizes::default() }, 200)
}

/// The sizes of a model of two layers.
fn config() -> Config {
    Sizes::default().write().model().config().clone()
}

fn kernel(name: &str) -> Kernel {
    name.parse().unwrap_or_else(|error| panic!("{name}: {error:#}"))
}

/// Where a name is refused, or the kernel that it means.
fn refusal(name: &str, config: &Config, capture: &Capture) -> String {
    let error = match name.parse::<Kernel>() {
        Ok(kernel) => match kernel.layers::<f32>(config, Some(capture), &[]) {
            Ok(_) => panic!("`{name}` was taken"),
            Err(error) => error,
        },
        Err(error) => error,
    };
    format!("{error:#}")
}

#[test]
fn good_names_come_back() {
    for name in [
        "softmax",
        "window:128",
        "window,window=128",
        "merged",
        "merged:64,pool,exact=9",
        "merged:64,window=32,sinks=2,heavy=4,decay=0.99,min-age=8,block=16,value-weight=0.5,\
         metric=query-diagonal",
        "merged:64,plan=some/file.json",
        "merged,plan=some/file.json,state=q8",
        "softmax,state=bf16",
        "ward:32,calibrated,block=4",
        "taylor",
        "performer:64,window=16,sinks=0,seed=18446744073709551615",
        "dct",
        "wpff:128,calibrated",
        "official,seed=3",
        "elu",
        "relu,exact=0",
        "dct:32,calibrated,exact=2,by=merged:64",
    ] {
        let kernel = kernel(name);
        assert_eq!((kernel.name(), kernel.to_string().as_str()), (name, name));
        assert_eq!(kernel.to_string().parse::<Kernel>().unwrap(), kernel);
        let alone = kernel.alone();
        assert_eq!(alone.name().parse::<Kernel>().unwrap(), alone);
        assert_eq!((alone.exact(), alone.alone()), (&Exact::None, alone.clone()));
    }
    assert_eq!(kernel(" merged:8 , pool,  exact=2 ").name(), "merged:8,pool,exact=2");
    assert_eq!(
        kernel("merged:8,pool,exact=2,by=elu,decay=0.9").alone().name(),
        "merged:8,decay=0.9"
    );
    assert_eq!(*kernel("merged,exact=3").exact(), Exact::Count(3, None));
    assert_eq!(*kernel("merged,plan=a b.json").exact(), Exact::Plan("a b.json".into()));
    for (name, fitted) in [
        ("merged", false),
        ("merged,calibrated", true),
        ("taylor", true),
        ("window:8,heavy=1", true),
    ] {
        assert_eq!(kernel(name).is_fitted(), fitted, "{name}");
    }
}

#[test]
fn bad_names_are_refused_by_name() {
    let cases = [
        ("", "no kernel ``"),
        ("mergd:64", "no kernel `mergd`"),
        ("Softmax", "no kernel `Softmax`"),
        ("merged:64,poool", "`poool` is not an option"),
        ("merged:64,pool=1", "`pool=1` is not an option"),
        ("merged:64,decay", "`decay` is not an option"),
        ("merged:64,", "`` is not an option"),
        ("merged:64,metric=cosine", "`metric=cosine` is not an option"),
        ("merged:64,decay=0.9,decay=0.9", "`decay` is given twice"),
        ("merged:64,pool,exact=1,pool", "`pool` is given twice"),
        ("merged:64,exact=1,plan=x", "`exact` and `plan` are two choices"),
        ("merged:64,by=elu", "`by` says how to choose heads: it needs `exact=N`"),
        ("merged:64,plan=x,by=elu", "`by` says how to choose heads: it needs `exact=N`"),
        ("merged:64,exact=2,by=elo", "no kernel `elo`"),
        ("merged:64,exact=2,by=", "no kernel ``"),
        ("merged:64,exact=2,by=elu,by=elu", "`by` is given twice"),
        ("window", "needs one size"),
        ("window:8,window=8", "needs one size"),
        ("softmax:8", "`softmax` has no size"),
        ("official:8", "`official` has no size"),
        ("hedgehog:8", "`hedgehog` has no size"),
        ("elu:8", "`elu` has no size"),
        ("relu:8", "`relu` has no size"),
        ("merged:", "`entries` is empty"),
        ("merged:many", "`entries` is many"),
        ("merged:-1", "`entries` is -1"),
        ("merged:64,window=x", "`window` is x"),
        ("merged:64,sinks=1.5", "`sinks` is 1.5"),
        ("merged:64,decay=high", "`decay` is high"),
        ("merged:64,min-age=", "`min-age` is empty"),
        ("ward:64,block=99999999999999999999", "`block` is 99999999999999999999"),
        ("dct:64,seed=-3", "`seed` is -3"),
        ("merged:64,exact=all", "`exact` is all"),
        ("softmax,exact=2", "exact in every head already"),
        ("softmax,plan=x", "exact in every head already"),
        // options that mean nothing to the kernel
        ("softmax,window=8", "`window` means nothing to `softmax`"),
        ("softmax,calibrated", "`calibrated` means nothing to `softmax`"),
        ("softmax,seed=1", "`seed` means nothing to `softmax`"),
        ("window:8,pool", "`pool` means nothing to `window:8`"),
        ("window:8,block=2", "`block` means nothing to `window:8`"),
        ("window:8,calibrated", "`calibrated` means nothing to `window:8`"),
        ("merged:8,seed=1", "`seed` means nothing to `merged:8`"),
        ("ward:8,pool", "`pool` means nothing to `ward:8`"),
        ("ward:8,decay=0.9", "`decay` means nothing to `ward:8`"),
        ("ward:8,min-age=2", "`min-age` means nothing to `ward:8`"),
        ("ward:8,value-weight=1", "`value-weight` means nothing to `ward:8`"),
        ("ward:8,metric=identity", "`metric` means nothing to `ward:8`"),
        ("taylor:3,block=2", "`block` means nothing to `taylor:3`"),
        ("taylor:3,seed=2", "`seed` means nothing to `taylor:3`"),
        ("official,sinks=2", "`sinks` means nothing to `official`"),
        ("window:8,decay=0.9", "`decay` means nothing to `window:8`"),
        ("dct:8,heavy=2", "`heavy` means nothing to `dct:8`: give it a window first"),
        ("wpff:8,pool", "`pool` means nothing to `wpff:8`"),
        ("official,window=8", "`window` means nothing to `official`"),
        ("official,calibrated", "`calibrated` means nothing to `official`"),
        ("elu,seed=1", "`seed` means nothing to `elu`"),
        ("relu,window=8", "`window` means nothing to `relu`"),
        // heads that share entries must have one kernel
        ("merged:64,pool,calibrated", "`pool`"),
        ("merged:64,heavy=2,pool", "`pool`"),
    ];
    for (name, expected) in cases {
        let error = format!("{:#}", name.parse::<Kernel>().unwrap_err());
        assert!(error.contains(expected), "`{name}`: {error}");
    }
    // who mistypes a name wants to see what there is
    for name in ["mergd", "merged:64,poool"] {
        assert!(name.parse::<Kernel>().unwrap_err().to_string().contains("merged:S"));
    }
}

#[test]
fn sizes_that_cannot_be_are_refused_when_built() {
    let (session, _file) = tiny();
    let cases = [
        ("merged:0", "entries"),
        ("ward:0", "entries"),
        ("taylor:0", "rank"),
        ("performer:0", "features"),
        ("dct:0", "features"),
        ("wpff:0", "features"),
        ("window:0,sinks=0", "something to attend to"),
        ("merged:8,block=0", "block"),
        ("ward:8,block=0", "block"),
        ("merged:8,decay=0", "decay"),
        ("merged:8,decay=1.5", "decay"),
        ("merged:8,decay=nan", "decay"),
        ("merged:8,value-weight=-1", "`value-weight` is -1"),
        ("merged:8,value-weight=inf", "`value-weight` is inf"),
        ("merged:2,pool", "4 entries"),
        ("merged:8,metric=identity,calibrated", "calibration"),
        ("taylor:17", "rank"),
        ("merged:18446744073709551615", "entries"),
        ("window:18446744073709551615", "window"),
        ("performer:18446744073709551615", "features"),
    ];
    for (name, expected) in cases {
        let error = refusal(name, session.model.config(), session.capture().unwrap());
        assert!(error.to_lowercase().contains(expected), "`{name}`: {error}");
    }
    let error = format!("{:#}", session.attention(&kernel("merged:8,exact=7")).unwrap_err());
    assert!(
        error.contains("`merged:8,exact=7` keeps 7 heads exact; the model has 6 kv heads"),
        "{error}"
    );
    let error =
        kernel("taylor").layers::<f32>(session.model.config(), None, &[]).unwrap_err().to_string();
    assert!(error.contains("needs a calibration text"), "{error}");
}

/// The number in a message is the one that was given, whatever became of it on the way.
#[test]
fn numbers_come_back_as_they_were_given() {
    let huge = ["1048577", "4294967296", "18446744073709551615", "99999999999999999999", "-1"];
    for (name, option) in [
        ("merged:", "entries"),
        ("ward:", "entries"),
        ("taylor:", "rank"),
        ("performer:", "features"),
        ("dct:", "features"),
        ("wpff:", "features"),
        ("window:", "window"),
        ("window,window=", "window"),
        ("merged:8,window=", "window"),
        ("dct:8,window=", "window"),
        ("merged:8,sinks=", "sinks"),
        ("window:8,heavy=", "heavy"),
        ("merged:8,min-age=", "min-age"),
        ("ward:8,block=", "block"),
    ] {
        for number in huge.into_iter().chain(["1.5", "1e3", "0x10", "many"]) {
            let error = format!("{name}{number}").parse::<Kernel>().unwrap_err().to_string();
            let expected = format!("`{option}` is {number}, not a whole number from ");
            assert!(error.starts_with(&expected), "{name}{number}: {error}");
        }
    }
    for (name, error) in [
        ("merged:8,block=0", "`block` is 0, not a whole number from 1 to 16383"),
        ("merged:0", "`entries` is 0, not a whole number from 1 to 16383"),
        ("merged:16384", "`entries` is 16384, not a whole number from 1 to 16383"),
        ("ward:16000,block=385", "`entries` is 16000 and `block` is 385, together more than 16384"),
        ("dct:65537", "`features` is 65537, not a whole number from 1 to 65536"),
        ("merged:8,decay=1e-400", "`decay` is 1e-400, not a number above 0, at most 1"),
        ("merged:8,decay=NaN", "`decay` is NaN, not a number above 0, at most 1"),
        ("merged:8,decay=1.0000000001", "`decay` is 1.0000000001, not a number above 0"),
        ("merged:8,value-weight=1e400", "`value-weight` is 1e400, not a finite number"),
        ("dct:8,seed=18446744073709551616", "`seed` is 18446744073709551616, not a whole"),
        ("merged:8,exact=4294967296", "`exact` is 4294967296, not a whole number"),
    ] {
        let found = name.parse::<Kernel>().unwrap_err().to_string();
        assert!(found.starts_with(error), "{name}: {found}");
    }
}

/// The largest sizes that are taken are taken by the crate, too.
#[test]
fn the_largest_sizes_make_kernels() {
    let config = config();
    for name in [
        "merged:16383,window=1048576,sinks=1048576,min-age=1048576",
        "merged:1,window=2,block=16383",
        "window:1048576",
        "ward:16383,window=2",
    ] {
        kernel(name).heads::<f32>(&config, None).unwrap();
    }
}

/// `‖ÂV − AV‖/‖AV‖` of a kernel in every head, behind the warm-up, worst first.
fn measured(session: &Session, name: &str) -> Vec<(f64, usize, usize)> {
    let exact = SoftmaxAttention::<f32>::new(session.model.config().head_dim).unwrap();
    let kernels =
        kernel(name).heads(session.model.config(), Some(session.capture().unwrap())).unwrap();
    let mut errors = Vec::new();
    for sample in session.capture().unwrap().samples() {
        let run = |kernel: &dyn Attention<f32>| {
            let mut out = Array3::zeros((sample.q.dim().0, sample.q.dim().1, sample.v.ncols()));
            kernel
                .forward_heads(
                    &mut [Head::group(sample.q, sample.k, sample.v, out.view_mut())],
                    Mask::Causal,
                    &mut Default::default(),
                )
                .unwrap();
            out.slice(s![.., session.warm_up().unwrap().., ..]).mapv(f64::from)
        };
        let (found, exact) = (run(&*kernels[sample.layer][sample.kv_head]), run(&exact));
        let norm = |x: &Array3<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        errors.push((norm(&(found - &exact)) / norm(&exact), sample.layer, sample.kv_head));
    }
    errors.sort_by(|a, b| b.0.total_cmp(&a.0));
    errors
}

#[test]
fn the_heads_with_the_largest_errors_stay_exact() {
    let (session, _file) = tiny();
    assert_eq!(session.warm_up().unwrap(), 50);
    let read = tokens(80, 300, 1);
    for (name, alone) in [
        ("merged:8,window=16,exact=", "merged:8,window=16"),
        ("merged:8,window=16,pool,exact=", "merged:8,window=16"),
        ("ward:8,window=16,calibrated,exact=", "ward:8,window=16,calibrated"),
        ("performer:16,exact=", "performer:16"),
    ] {
        let errors = measured(&session, alone);
        for count in 0..=6 {
            let attention = session.attention(&kernel(&format!("{name}{count}"))).unwrap();
            let plan = attention.plan.unwrap();
            let mut expected: Vec<_> = errors[..count].iter().map(|e| (e.1, e.2)).collect();
            expected.sort_unstable();
            assert_eq!(plan.heads.heads(), expected, "{name}{count}");
            assert_eq!((plan.kernel.as_str(), plan.tokens, plan.warm_up), (alone, 200, 50));
            for (found, expected) in plan.heads.errors().ranked().iter().zip(&errors) {
                assert_eq!((found.layer, found.kv_head), (expected.1, expected.2));
                assert!((found.output_error / expected.0 - 1.0).abs() < 1e-5);
            }
            if name.contains("pool") {
                continue;
            }
            // the same by hand
            let exact: Arc<dyn Attention<f32>> = Arc::new(SoftmaxAttention::new(16).unwrap());
            let mut heads = kernel(alone)
                .heads(session.model.config(), Some(session.capture().unwrap()))
                .unwrap();
            for (layer, kv_head) in expected {
                heads[layer][kv_head] = Arc::clone(&exact);
            }
            let layers: Vec<_> =
                heads.into_iter().map(|layer| MultiHead::per_kv_head(layer, 4).unwrap()).collect();
            let of = |layers| {
                logits(&session.model, &mut session.model.state(layers).unwrap(), &read, &[])
            };
            assert_eq!(of(&attention.layers), of(&layers), "{name}{count}");
        }
    }
}

#[test]
fn another_kernel_may_choose_the_heads() {
    let (session, _file) = tiny();
    for by in ["elu", "performer:16", "window:4", "taylor:2"] {
        let plan = session
            .attention(&kernel(&format!("merged:8,pool,exact=2,by={by}")))
            .unwrap()
            .plan
            .unwrap();
        let mut expected: Vec<_> = measured(&session, by)[..2].iter().map(|e| (e.1, e.2)).collect();
        expected.sort_unstable();
        assert_eq!((plan.heads.heads(), plan.kernel.as_str()), (&expected[..], by));
    }
}

#[test]
fn all_heads_exact_is_softmax() {
    let (session, _file) = tiny();
    let read = tokens(80, 300, 2);
    let of = |layers: &[MultiHead<f32>]| {
        logits(&session.model, &mut session.model.state(layers).unwrap(), &read, &[])
    };
    let exact = of(&softmax(&session.model));
    for name in [
        "merged:8,window=8,exact=6",
        "merged:8,window=8,pool,exact=6",
        "elu,exact=6",
        "taylor:2,exact=6",
    ] {
        assert_eq!(of(&session.attention(&kernel(name)).unwrap().layers), exact, "{name}");
    }
}

#[test]
fn plans_are_saved_and_loaded() {
    let (session, file) = tiny();
    let path = file.folder.path().join("plan.json");
    let config = session.model.config();
    let attention = session.attention(&kernel("merged:8,window=16,pool,exact=3")).unwrap();
    let plan = attention.plan.unwrap();
    plan.save(&path).unwrap();
    assert_eq!(Plan::load(&path, config).unwrap(), plan);
    let again = session
        .attention(&kernel(&format!("merged:8,window=16,pool,plan={}", path.display())))
        .unwrap();
    assert_eq!(again.plan.unwrap(), plan);
    let read = tokens(90, 300, 3);
    let of = |layers: &[MultiHead<f32>]| {
        logits(&session.model, &mut session.model.state(layers).unwrap(), &read, &[])
    };
    assert_eq!(of(&again.layers), of(&attention.layers));
    let missing = file.folder.path().join("nowhere").join("plan.json");
    assert!(plan.save(&missing).unwrap_err().to_string().contains("cannot write"));
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let (session, file) = tiny();
    let path = file.folder.path().join("plan.json");
    let refused = || {
        let kernel = kernel(&format!("merged:8,window=16,plan={}", path.display()));
        let error = format!("{:#}", session.attention(&kernel).unwrap_err());
        assert!(error.contains("plan.json"), "{error}");
        error
    };
    assert!(refused().contains("cannot read"));
    session
        .attention(&kernel("merged:8,window=16,exact=2"))
        .unwrap()
        .plan
        .unwrap()
        .save(&path)
        .unwrap();
    let good = fs::read_to_string(&path).unwrap();
    for damaged in [
        "",
        "[]",
        "7",
        &good[..good.len() / 2],
        &good.replace("\"kernel\"", "\"karnel\""),
        &format!("{good}x"),
    ] {
        fs::write(&path, damaged).unwrap();
        assert!(refused().contains("is not a plan"));
    }
    let json: Value = serde_json::from_str(&good).unwrap();
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut json = json.clone();
        edit(&mut json);
        fs::write(&path, json.to_string()).unwrap();
        refused()
    };
    // heads that the table does not have, or has once
    assert!(
        edited(&|json| json["heads"]["heads"] = json!([[0, 0], [3, 0]]))
            .contains("kv head 0 of layer 3")
    );
    assert!(
        edited(&|json| json["heads"]["heads"] = json!([[1, 0], [0, 0], [1, 0]]))
            .contains("kv head 0 of layer 1")
    );
    assert!(edited(&|json| json["heads"]["heads"] = json!([[-1, 0]])).contains("is not a plan"));
    // a table that is not one of this model
    let sizes = "a model of other sizes";
    let short =
        edited(&|json| drop(json["heads"]["errors"]["ranked"].as_array_mut().unwrap().pop()));
    assert!(short.contains(sizes), "{short}");
    let doubled = edited(&|json| {
        let ranked = json["heads"]["errors"]["ranked"].as_array_mut().unwrap();
        ranked[5] = ranked[0].clone();
        json["heads"]["heads"] = json!([]);
    });
    assert!(doubled.contains(sizes), "{doubled}");
    let beyond = edited(&|json| {
        json["heads"]["errors"]["ranked"][5]["layer"] = json!(3);
        json["heads"]["heads"] = json!([]);
    });
    assert!(beyond.contains(sizes), "{beyond}");
    for other in
        [Sizes { kv_heads: 1, ..Sizes::default() }, Sizes { layers: 2, ..Sizes::default() }]
    {
        let (other, _file) = crate::common::session(&other, 100);
        other
            .attention(&kernel("merged:8,window=16,exact=1"))
            .unwrap()
            .plan
            .unwrap()
            .save(&path)
            .unwrap();
        let error = refused();
        assert!(error.contains(sizes) && error.contains("3 layers of 2 kv heads"), "{error}");
    }
    // a person's choice among the heads of the table is one
    let mut chosen = json;
    chosen["heads"]["heads"] = json!([[2, 1], [0, 0]]);
    fs::write(&path, chosen.to_string()).unwrap();
    assert_eq!(Plan::load(&path, session.model.config()).unwrap().heads.heads(), [(0, 0), (2, 1)]);
}

#[test]
fn a_pool_of_one_head_is_a_head_alone() {
    let (session, file) = tiny();
    let path = file.folder.path().join("plan.json");
    let config = session.model.config();
    let mut plan = session.attention(&kernel("merged:8,window=16,exact=1")).unwrap().plan.unwrap();
    // layer 0: both heads; layer 1: one; layer 2: none
    plan.heads = plan.heads.errors().choose(&[(1, 0), (2, 0), (2, 1)]).unwrap();
    plan.save(&path).unwrap();
    let of = |name: &str| {
        let layers =
            session.attention(&kernel(&format!("{name},plan={}", path.display()))).unwrap().layers;
        let mut state = session.model.state(&layers).unwrap();
        let found = logits(&session.model, &mut state, &tokens(100, 300, 5), &[]);
        assert_eq!(state.bytes(), state_bytes(&layers, config, 100).unwrap());
        (found, layers.iter().map(|layer| layer.state_bytes(16, 100).unwrap()).collect::<Vec<_>>())
    };
    let ((pooled, bytes), (apart, bytes_apart)) =
        (of("merged:8,window=16,pool"), of("merged:8,window=16"));
    assert_eq!(bytes, bytes_apart);
    assert_eq!(bytes[2], 2 * 100 * 32 * 4);
    assert!(pooled != apart && bytes[0] < bytes[1] && bytes[1] < bytes[2]);
    // without the pool of layer 0 the two are the same
    plan.heads = plan.heads.errors().choose(&[(0, 1), (1, 0), (2, 0), (2, 1)]).unwrap();
    plan.save(&path).unwrap();
    assert_eq!(of("merged:8,window=16,pool").0, of("merged:8,window=16").0);
}

#[test]
fn seeds_draw_other_maps() {
    let config = config();
    let (session, _file) = session(&Sizes::default(), 100);
    let read = tokens(60, 300, 6);
    for name in ["performer:32", "dct:32", "wpff:32", "official"] {
        let of = |name: &str| {
            let layers = kernel(name).layers(&config, None, &[]).unwrap();
            logits(&session.model, &mut session.model.state(&layers).unwrap(), &read, &[])
        };
        let seeds = [of(name), of(&format!("{name},seed=0")), of(&format!("{name},seed=1"))];
        assert_eq!(seeds[0], seeds[1], "{name}");
        assert_ne!(seeds[0], seeds[2], "{name}");
    }
}
