use dijiang::*;
use language_model::{capture::Capture, model::Model};
use ndarray::s;
fn main() -> anyhow::Result<()> {
    let m = Model::load(std::path::Path::new(&std::env::args().nth(1).unwrap()))?;
    let j: serde_json::Value = serde_json::from_reader(std::fs::File::open("/work/shared/data/lm/tokens.json")?)?;
    let tok: Vec<u32> =
        j["calibration"]["tokens"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect();
    let c = Capture::of(&m, &tok)?;
    let exact = SoftmaxAttention::<f32>::new(64)?;
    let small = HybridAttention::<f32>::builder(64).window(64).sinks(4).far(Far::merged(64)).build()?;
    let t = std::time::Instant::now();
    let e = HeadErrors::measure(&exact, &small, &c.samples(), 256)?;
    println!("{:?}", t.elapsed());
    let mut all = vec![];
    for sm in c.samples() {
        let run = |k: &dyn Attention<f32>| -> anyhow::Result<_> {
            let mut o = ndarray::Array3::zeros((3, 2048, 64));
            k.forward_group(sm.q, sm.k, sm.v, Mask::Causal, o.view_mut(), &mut Scratch::new())?;
            Ok(o)
        };
        let (a, b) = (run(&exact)?, run(&small)?);
        let mut sum = 0.0;
        for h in 0..3 {
            let x = a.slice(s![h, 256.., ..]);
            let y = b.slice(s![h, 256.., ..]);
            let d = (&y - &x).mapv(|v| v * v).sum();
            sum += d / x.mapv(|v| v * v).sum();
        }
        all.push((sum, sm.layer, sm.kv_head));
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (r, a) in e.ranked().iter().zip(&all).take(14) {
        println!(
            "{}.{} {:.4} ({:.4})   | {}.{} {:.4}",
            r.layer,
            r.kv_head,
            r.output_error,
            r.output_error.powi(2) * 3.0,
            a.1,
            a.2,
            a.0
        );
    }
    Ok(())
}
