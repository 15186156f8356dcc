//! What decay costs: sums that forget against the same sums without, whole sequences and decode
//! steps.

use super::{Contestant, D, D_V, Input, M, Targets, decode, oracle, race, race_for};
use dijiang::{
    Attention, EluFeatures, FeatureMap, FixedGates, IdentityFeatures, LinearAttention, Performer,
};
use ndarray::{Array1, Array2};

/// The decay of the first head of retention and of the released DiJiang code.
const GAMMA: f64 = 1.0 - 1.0 / 32.0;

/// Log decays of tokens, around those of [`GAMMA`].
fn gates(n: usize, columns: usize) -> Array2<f32> {
    oracle::normal(n, columns, 12).mapv(|x| 0.04 * -x.abs())
}

/// `Σ_j Σ_i φ_i(q_t) φ_i(k_j) e^{Σ_{s=j+1..t} g_si} v_j` for features `[fq, fk]`, over its sum
/// without v if `normalized`.
fn formula(
    [fq, fk]: [Vec<Vec<f64>>; 2],
    v: &Array2<f32>,
    normalized: bool,
    log_decay: impl Fn(usize, usize) -> f64,
) -> Array2<f64> {
    let mut out = Array2::zeros(v.dim());
    for (t, query) in fq.iter().enumerate() {
        let mut total = 0.0;
        let mut faded = vec![0.0; M];
        for j in (0..=t).rev() {
            let weight: f64 = (0..M).map(|i| query[i] * fk[j][i] * f64::exp(faded[i])).sum();
            total += weight;
            out.row_mut(t).scaled_add(weight, &v.row(j).mapv(f64::from));
            faded.iter_mut().enumerate().for_each(|(i, faded)| *faded += log_decay(j, i));
        }
        if normalized {
            out.row_mut(t).mapv_inplace(|x| x / total);
        }
    }
    out
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
    features: impl Fn(&[f64]) -> Vec<f64>,
) {
    let sample = [2, 3, 4].map(|seed| oracle::normal(200, D, seed));
    let shrink = (D as f32).powf(-0.25);
    let of = |x: &Array2<f32>| {
        oracle::wide_rows(x.mapv(|x| x * shrink).view()).iter().map(|x| features(x)).collect()
    };
    for (index, kernel) in kernels.iter().enumerate() {
        let channel = |i: usize| (1.0 - (1.0 - GAMMA) * (i as f64 + 0.5) / M as f64).ln();
        let gates = &kernel.2;
        let exact =
            formula([of(&sample[0]), of(&sample[1])], &sample[2], normalized, |t, i| {
                match (index, gates) {
                    (_, Some(gates)) => f64::from(gates[[t, i.min(gates.ncols() - 1)]]),
                    (1, _) => GAMMA.ln(),
                    (2, _) => channel(i),
                    _ => 0.0,
                }
            });
        super::check(kernel.0, &*attention(kernel), &exact, &sample);
    }
}

pub fn decay(rounds: usize, quick: bool, targets: &mut Targets) {
    let n = if quick { 2048 } else { 8192 };
    let input = Input::<f32>::new(n);
    let performer = Performer::<f32>::new(D, M, 1).expect("sizes are positive");
    let projection = oracle::wide_rows(performer.projection().view());
    let performer = kinds(LinearAttention::new(performer), n);
    check(&performer, true, |x| {
        oracle::log_exponential_features(&projection, x).iter().map(|x| x.exp()).collect()
    });
    let elu =
        kinds(LinearAttention::new(EluFeatures::<f32>::new(D).expect("sizes are positive")), n);
    check(&elu, true, |x| x.iter().map(|&x| if x > 0.0 { x + 1.0 } else { x.exp() }).collect());
    let identity = IdentityFeatures::<f32>::new(D).expect("sizes are positive");
    let identity = kinds(LinearAttention::new(identity).unnormalized(), n);
    check(&identity, false, <[f64]>::to_vec);
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
