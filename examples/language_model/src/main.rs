use language_model::{compare::*, kernels::*, recall::*, session::Session};
fn main() -> anyhow::Result<()> {
    let a: Vec<String> = std::env::args().collect();
    let files: Vec<std::path::PathBuf> = if a[2] == "emb" { vec![] } else { vec![a[2].clone().into()] };
    let s = Session::open(a[1].as_ref(), &files, None, 2048)?;
    let ks: Vec<Kernel> = a[4..].iter().map(|x| x.parse()).collect::<Result<_, _>>()?;
    let tasks = [(5, 0), (10, 0), (20, 0), (40, 0), (20, 256), (20, 1024)]
        .map(|(pairs, distance)| Task { pairs, distance })
        .to_vec();
    let c = compare(
        &s,
        &ks,
        &Program { context: 2048, tasks, prompts: 2, copied: 400, lengths: vec![512, 1024, 2048, 4096, 8192] },
    )?;
    std::fs::write(&a[3], serde_json::to_string_pretty(&c)?)?;
    for r in &c.rows {
        println!(
            "{} {:.3} {:.3} share {:.2} {:.0} tok/s copy {:.3} {:?}\n  {:?}\n  {:?} {:?}",
            r.kernel,
            r.halves[0].exp(),
            r.halves[1].exp(),
            r.attention_share,
            r.tokens_per_second,
            r.copying.share(),
            r.recall.iter().map(|r| r.score.right).collect::<Vec<_>>(),
            r.decode,
            r.state,
            r.state_bytes
        );
    }
    println!("{}", c.seconds);
    Ok(())
}
