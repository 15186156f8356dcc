//! What decay costs: sums that forget against the same sums without, whole sequences and decode
//! steps.

use super::{Contestant, D, D_V, Input, M, Targets, decode, oracle, race, race_for};
use dijiang::attention::naive::{
    features::{self, Features},
    linear,
};
use dijiang::{
    Attention, EluFeatures, FeatureMap, FixedGates, IdentityFeatures, LinearAttention, Performer,
};
use ndarray::{Array1, Array2, s};

/// The decay of the first head of retention and of the released DiJiang code.
const GAMMA: f64 = 1.0 - 1.0 / 32.0;

/// Log decays of tokens, around those of [`GAMMA`].
fn gates(n: usize, columns: usize) -> Array2<f32> {
    oracle::normal(n, columns, 12).mapv(|x| 0.04 * -x.abs())
}

type Kernel<F> = (&'static str, LinearAttention<F>, Option<Array2<f32>>);

/// One kernel with every kind of decay; the first has none.
fn kinds<F: FeatureMap<f32> + 'static>(plain: LinearAttention<F>, n: usize) -> Vec<Kernel<F>> {
    let kernel = || plain.clone();
    let channels = Array1::from_shape_fn(M, |i| 1.0 - (1.0 - GAMMA) * (i as f64 + 0.5) / M as f64);
    vec![
        ("no decay", kernel(), None),
        ("one for all", kernel().with_decay(GAMMA), None),
        ("each feature", kernel().with_channel_decay(channels), None),
        ("each token", kernel().gated(), Some(gates(n, 1))),
        ("each token and feature", kernel().gated(), Some(gates(n, M))),
    ]
}

fn attention<F: FeatureMap<f32> + 'static>(
    (_, kernel, gates): &Kernel<F>,
) -> Box<dyn Attention<f32>> {
    match gates {
        None => Box::new(kernel.clone()),
        Some(gates) => Box::new(FixedGates::new(kernel.clone(), gates.clone())),
    }
}

/// Refuses to go on if a kernel does not compute its formula.
fn check<F: FeatureMap<f32> + 'static>(
    kernels: &[Kernel<F>],
    normalized: bool,
    features: impl Fn(&Array2<f32>) -> Features,
) {
    let sample = [2, 3, 4].map(|seed| oracle::normal(200, D, seed));
    let [phi_q, phi_k] = [0, 1].map(|i| features(&sample[i]).absolute());
    let v = oracle::wide(sample[2].view());
    for (index, kernel) in kernels.iter().enumerate() {
        let channel = |i: usize| (1.0 - (1.0 - GAMMA) * (i as f64 + 0.5) / M as f64).ln();
        let log_decay = match (index, &kernel.2) {
            (_, Some(gates)) => oracle::wide(gates.slice(s![..200, ..])),
            (1, _) => Array2::from_elem((1, 1), GAMMA.ln()),
            (2, _) => Array2::from_shape_fn((1, M), |(_, i)| channel(i)),
            _ => Array2::zeros((1, 1)),
        };
        let formula = if normalized { linear::gated } else { linear::gated_unnormalized };
        let exact = formula(&phi_q, &phi_k, &v, &log_decay);
        super::check(kernel.0, &*attention(kernel), &exact, &sample);
    }
}

pub fn decay(rounds: usize, quick: bool, targets: &mut Targets) {
    let n = if quick { 2048 } else { 8192 };
    let input = Input::<f32>::new(n);
    let performer = Performer::<f32>::new(D, M, 1).expect("sizes are positive");
    let projection = performer.projection().to_owned();
    let performer = kinds(LinearAttention::new(performer), n);
    check(&performer, true, |x| oracle::performer(projection.view(), x.view()));
    // the other maps see scaled vectors too
    let shrink = (D as f64).powf(-0.25);
    let scaled = |x: &Array2<f32>| oracle::wide(x.view()) * shrink;
    let elu =
        kinds(LinearAttention::new(EluFeatures::<f32>::new(D).expect("sizes are positive")), n);
    check(&elu, true, |x| features::elu(&scaled(x)));
    let identity = IdentityFeatures::<f32>::new(D).expect("sizes are positive");
    let identity = kinds(LinearAttention::new(identity).unnormalized(), n);
    check(&identity, false, |x| features::identity(&scaled(x)));
    type Row<'a> = (&'a str, Vec<Box<dyn Attention<f32>>>);
    let rows: [Row; 3] = [
        ("Performer", performer.iter().map(attention).collect()),
        ("elu + 1", elu.iter().map(attention).collect()),
        ("identity, no denominator", identity.iter().map(attention).collect()),
    ];
    for (name, kernels) in &rows {
        let mut whole: Vec<Contestant> =
            kernels.iter().map(|kernel| Contestant::new("", input.run(&**kernel, n))).collect();
        race_for(if quick { 0.004 } else { 0.05 }, &mut whole, rounds);
        let mut steps: Vec<Contestant> = kernels
            .iter()
            .map(|kernel| {
                Contestant::new(
                    "",
                    decode(kernel.stream(D_V).expect("sizes are positive"), &input, 64),
                )
            })
            .collect();
        race(&mut steps, rounds);
        println!("{:<30}{:>12}{:>12}{:>12}{:>12}", *name, "ms", "ratio", "step ns", "ratio");
        for ((kind, whole_time), step) in
            performer.iter().map(|kernel| kernel.0).zip(&whole).zip(&steps)
        {
            let (ms, ns) = (whole_time.seconds() * 1e3, step.seconds() * 1e9);
            let (ratio, step_ratio) =
                (whole_time.seconds() / whole[0].seconds(), step.seconds() / steps[0].seconds());
            println!("{kind:<30}{ms:>12.3}{ratio:>12.3}{ns:>12.0}{step_ratio:>12.2}");
        }
        println!();
        for (i, what) in [(1, "one decay for all"), (3, "one for each token")] {
            let ratio = whole[i].seconds() / whole[0].seconds();
            targets.at_most(&format!("{what} against none, {name}, n = {n}"), ratio, 1.15);
        }
        println!();
    }
}
