//! A decode step of a layer against the same steps of its heads, one by one.

use super::{Contestant, D, D_V, M, Targets, oracle, race};
use dijiang::{
    Attention, Far, HybridAttention, LinearAttention, MultiHead, Performer, SoftmaxAttention,
    Stream,
};
use ndarray::{Array2, Array4, Axis, s};
use std::sync::Arc;

const HEADS: usize = 32;

/// Tokens before the steps that are timed.
const PREFILL: usize = 256;

/// Steps after which a stream goes back, so that a cache stays near its length.
const STEPS: usize = 64;

fn numbers(seed: u64) -> Array4<f32> {
    let rows = HEADS * (PREFILL + STEPS);
    let numbers = oracle::normal(rows, D, seed).into_raw_vec_and_offset().0;
    Array4::from_shape_vec((1, HEADS, PREFILL + STEPS, D), numbers).expect("as many numbers")
}

/// What a layer of a kernel costs beside its heads: at most 1.15 of 32 single steps.
pub fn layers(rounds: usize, targets: &mut Targets) {
    let [q, k, v] = [11, 12, 13].map(numbers);
    println!("A decode step of a layer of {HEADS} heads against single steps of its heads");
    let performer = Performer::<f32>::new(D, M, 1).expect("sizes are positive");
    let linear = LinearAttention::new(performer);
    let decay = linear.clone().with_decay(0.97);
    let softmax = SoftmaxAttention::<f32>::new(D).expect("sizes are positive");
    let merged = HybridAttention::<f32>::builder(D).far(Far::merged(64)).build().expect("options");
    let kernels: [(&str, Arc<dyn Attention<f32>>); 4] = [
        ("linear, m = 64", Arc::new(linear)),
        ("linear with decay", Arc::new(decay)),
        ("softmax over 256 tokens", Arc::new(softmax)),
        ("window 64 and merged 64", Arc::new(merged)),
    ];
    for (name, kernel) in kernels {
        let layer = MultiHead::new(Arc::clone(&kernel), HEADS, HEADS).expect("numbers of heads");
        let mut stream = layer.stream(1, D_V).expect("sizes are positive");
        let before = s![.., .., ..PREFILL, ..];
        let mut out = Array4::<f32>::zeros((1, HEADS, PREFILL, D_V));
        let [pq, pk, pv] = [&q, &k, &v].map(|x| x.slice(before));
        stream.extend(pq, pk, pv, None, out.view_mut()).expect("the input is finite");
        stream.checkpoint();
        let mut heads: Vec<Box<dyn Stream<f32>>> = Vec::new();
        for h in 0..HEADS {
            let mut head = kernel.stream(D_V).expect("sizes are positive");
            let [q, k, v] = [&q, &k, &v].map(|x| x.slice(s![0, h, ..PREFILL, ..]));
            let mut of_head = Array2::zeros((PREFILL, D_V));
            head.extend(q, k, v, of_head.view_mut()).expect("the input is finite");
            assert_eq!(of_head, out.slice(s![0, h, .., ..]), "{name}: a layer has the same bits");
            head.checkpoint();
            heads.push(head);
        }

        let mut out = Array4::<f32>::zeros((1, HEADS, 1, D_V));
        let (of_layer, of_heads) = ([&q, &k, &v], [&q, &k, &v]);
        let mut t = PREFILL;
        let whole = move || {
            let [q, k, v] = of_layer.map(|x| x.slice(s![.., .., t..=t, ..]));
            stream.extend(q, k, v, None, out.view_mut()).expect("the input is finite");
            t += 1;
            if t == PREFILL + STEPS {
                stream.rollback().expect("there is a checkpoint");
                t = PREFILL;
            }
        };
        let mut out = Array2::<f32>::zeros((HEADS, D_V));
        let mut t = PREFILL;
        let single = move || {
            for (h, head) in heads.iter_mut().enumerate() {
                let [q, k, v] = of_heads.map(|x| x.slice(s![0, h, t..=t, ..]));
                let out = out.row_mut(h).insert_axis(Axis(0));
                head.extend(q, k, v, out).expect("the input is finite");
            }
            t += 1;
            if t == PREFILL + STEPS {
                heads.iter_mut().for_each(|head| head.rollback().expect("there is a checkpoint"));
                t = PREFILL;
            }
        };
        let mut contestants = [Contestant::new("layer", whole), Contestant::new("heads", single)];
        race(&mut contestants, rounds);
        let [layer, heads] = contestants.each_ref().map(Contestant::seconds);
        println!("  {name:<24} {:8.2} µs a layer, {:8.2} µs its heads", layer * 1e6, heads * 1e6);
        targets.at_most(&format!("{name}: layer / heads"), layer / heads, 1.15);
    }
    println!();
}
