//! The crate's side of the comparison with Python peers: a server that `benches/peers/peers.py`
//! builds and drives.
//!
//! With `--serve` it reads a request per line from standard input and answers each with one line on
//! standard output:
//!
//! ```text
//! load DIR N D               q.bin, k.bin, v.bin [N, D], omega.bin [m, D]      → ok
//! run KIND REPEATS           causal `forward_into` over what was loaded        → seconds per call
//! write KIND FILE            the output of the last `run`                      → ok
//! decode KIND STEPS          single-token `extend` after a prefill of all N    → seconds per step
//! write-decode KIND FILE     the outputs of the last `decode`                  → ok
//! train KIND REPEATS         a forward pass, then a backward pass with v in the place of the
//!                            gradient by the outputs                           → seconds per call
//! write-train KIND FILE      the gradient by k of the last `train`             → ok
//! ```
//!
//! Files are raw little-endian `f32`.
//!
//! `KIND` is `linear` (the Performer map of omega), `elu` (elu + 1, scale 1) or `softmax`; file
//! names have no spaces. Decoded tokens are the loaded ones again, from the first. A request that
//! cannot be served is answered by `error` and a sentence. The script checks what is written before
//! it believes a time.

use dijiang::{
    Attention, EluFeatures, ForwardRecord, Head, HeadGradient, LinearAttention, Mask, Performer,
    Scratch, SoftmaxAttention, SumCheckpoints,
};
use ndarray::{Array2, Axis, s};
use std::error::Error;
use std::hint::black_box;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

fn main() -> std::io::Result<()> {
    if !std::env::args().any(|argument| argument == "--serve") {
        println!("This benchmark is driven by benches/peers/peers.py.");
        return Ok(());
    }
    let mut loaded = None;
    let mut answers = std::io::stdout().lock();
    for request in std::io::stdin().lock().lines() {
        match answer(&request?, &mut loaded) {
            Ok(answer) => writeln!(answers, "{answer}")?,
            Err(error) => writeln!(answers, "error: {}", error.to_string().replace('\n', " "))?,
        }
        answers.flush()?;
    }
    Ok(())
}

fn answer(request: &str, loaded: &mut Option<Loaded>) -> Result<String, Box<dyn Error>> {
    let words: Vec<&str> = request.split_whitespace().collect();
    if let ["load", directory, n, d] = words[..] {
        *loaded = None; // frees the former arrays, and a failure leaves nothing half loaded
        *loaded = Some(Loaded::read(Path::new(directory), n.parse()?, d.parse()?)?);
        return Ok("ok".to_owned());
    }
    let loaded = loaded.as_mut().ok_or("nothing is loaded: send `load DIR N D` first")?;
    match words[..] {
        ["run", kind, repeats] => Ok(loaded.run(kind, repeats.parse()?)?.to_string()),
        ["train", kind, repeats] => Ok(loaded.train(kind, repeats.parse()?)?.to_string()),
        ["write-train", kind, file] => {
            write_array(Path::new(file), &loaded.contestant(kind)?.gradients[1])
        }
        ["decode", kind, steps] => Ok(loaded.decode(kind, steps.parse()?)?.to_string()),
        ["write", kind, file] => write_array(Path::new(file), &loaded.contestant(kind)?.out),
        ["write-decode", kind, file] => {
            write_array(Path::new(file), &loaded.contestant(kind)?.decoded)
        }
        _ => Err(format!("`{request}` is no request; see the head of benches/peers.rs").into()),
    }
}

/// A sequence and the kernels to run on it.
struct Loaded {
    q: Array2<f32>,
    k: Array2<f32>,
    v: Array2<f32>,
    contestants: [Contestant; 3],
}

struct Contestant {
    kind: &'static str,
    kernel: Box<dyn Attention<f32>>,
    out: Array2<f32>,
    decoded: Array2<f32>,
    /// By q, k and v.
    gradients: [Array2<f32>; 3],
    scratch: Scratch<f32>,
}

impl Loaded {
    fn read(directory: &Path, n: usize, d: usize) -> Result<Self, Box<dyn Error>> {
        if n == 0 {
            return Err("N must be at least 1".into());
        }
        let sequence = |name| -> Result<Array2<f32>, Box<dyn Error>> {
            let array = read_array(&directory.join(name), d)?;
            let rows = array.nrows();
            if rows == n {
                Ok(array)
            } else {
                Err(format!("{name} has {rows} rows where {n} were announced").into())
            }
        };
        let (q, k, v) = (sequence("q.bin")?, sequence("k.bin")?, sequence("v.bin")?);
        let map = Performer::from_projection(read_array(&directory.join("omega.bin"), d)?)?;
        let contestant = |kind, kernel| Contestant {
            kind,
            kernel,
            // an output that was never written fails its check
            out: Array2::from_elem((n, d), f32::NAN),
            decoded: Array2::zeros((0, d)),
            gradients: [(); 3].map(|()| Array2::zeros((n, d))),
            scratch: Scratch::new(),
        };
        let contestants = [
            contestant("linear", Box::new(LinearAttention::new(map))),
            contestant(
                "elu",
                Box::new(LinearAttention::new(EluFeatures::<f32>::new(d)?).with_scale(1.0)),
            ),
            contestant("softmax", Box::new(SoftmaxAttention::<f32>::new(d)?)),
        ];
        Ok(Self { q, k, v, contestants })
    }

    fn contestant(&mut self, kind: &str) -> Result<&mut Contestant, Box<dyn Error>> {
        find(&mut self.contestants, kind)
    }

    /// Seconds per call over `repeats` calls.
    fn run(&mut self, kind: &str, repeats: u16) -> Result<f64, Box<dyn Error>> {
        at_least_one("REPEATS", repeats)?;
        let Self { q, k, v, contestants } = self;
        let Contestant { kernel, out, .. } = find(contestants, kind)?;
        let start = Instant::now();
        for _ in 0..repeats {
            kernel.forward_into(
                black_box(q.view()),
                k.view(),
                v.view(),
                Mask::Causal,
                out.view_mut(),
            )?;
        }
        Ok(start.elapsed().as_secs_f64() / f64::from(repeats))
    }

    /// Seconds per forward and backward pass over `repeats` of them.
    fn train(&mut self, kind: &str, repeats: u16) -> Result<f64, Box<dyn Error>> {
        at_least_one("REPEATS", repeats)?;
        let Self { q, k, v, contestants } = self;
        let Contestant { kernel, out, gradients, scratch, .. } = find(contestants, kind)?;
        // exact softmax can make use of the one, linear attention of the other
        let is_recorded = kind == "softmax";
        let mut log_normalizer = Array2::zeros((1, q.nrows()));
        let mut kept = SumCheckpoints::new();
        let start = Instant::now();
        for _ in 0..repeats {
            let inputs = [black_box(q.view()), k.view(), v.view()];
            let mut head = Head::new(inputs[0], inputs[1], inputs[2], out.view_mut());
            if is_recorded {
                head = head.with_log_normalizer(log_normalizer.view_mut());
            } else {
                head = head.with_checkpoints(&mut kept);
            }
            kernel.forward_heads(&mut [head], Mask::Causal, scratch)?;
            let [d_q, d_k, d_v] = &mut *gradients;
            [&mut *d_q, &mut *d_k, &mut *d_v].into_iter().for_each(|d| d.fill(0.0));
            let views = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
            let mut head = HeadGradient::new(inputs, v.view(), views);
            if is_recorded {
                let out = out.view().insert_axis(Axis(0));
                let log_normalizer = log_normalizer.view();
                head = head.with_record(ForwardRecord { out, log_normalizer });
            } else {
                head = head.with_checkpoints(&kept);
            }
            kernel.backward_heads(&mut [head], Mask::Causal, scratch)?;
        }
        Ok(start.elapsed().as_secs_f64() / f64::from(repeats))
    }

    /// Seconds per step over `steps` steps, the prefill not counted.
    fn decode(&mut self, kind: &str, steps: u16) -> Result<f64, Box<dyn Error>> {
        at_least_one("STEPS", steps)?;
        let Self { q, k, v, contestants } = self;
        let Contestant { kernel, out, decoded, .. } = find(contestants, kind)?;
        let (n, d_v) = v.dim();
        let mut stream = kernel.stream(d_v)?;
        stream.extend(q.view(), k.view(), v.view(), out.view_mut())?;
        // an unwritten row fails its check
        *decoded = Array2::from_elem((usize::from(steps), d_v), f32::NAN);
        let start = Instant::now();
        for (step, out) in decoded.axis_chunks_iter_mut(Axis(0), 1).enumerate() {
            let token = s![step % n..=step % n, ..];
            stream.extend(black_box(q.slice(token)), k.slice(token), v.slice(token), out)?;
        }
        Ok(start.elapsed().as_secs_f64() / f64::from(steps))
    }
}

fn find<'a>(
    contestants: &'a mut [Contestant],
    kind: &str,
) -> Result<&'a mut Contestant, Box<dyn Error>> {
    let found = contestants.iter_mut().find(|contestant| contestant.kind == kind);
    found.ok_or_else(|| format!("`{kind}` is no kind: say linear, elu or softmax").into())
}

fn at_least_one(what: &str, number: u16) -> Result<(), String> {
    if number == 0 { Err(format!("{what} must be at least 1")) } else { Ok(()) }
}

fn read_array(path: &Path, columns: usize) -> Result<Array2<f32>, Box<dyn Error>> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let (numbers, rest) = bytes.as_chunks();
    if columns == 0 || numbers.len() % columns != 0 || !rest.is_empty() {
        return Err(format!(
            "{}: {} bytes are no whole rows of {columns} f32",
            path.display(),
            bytes.len()
        )
        .into());
    }
    let numbers: Vec<f32> = numbers.iter().map(|&number| f32::from_le_bytes(number)).collect();
    Ok(Array2::from_shape_vec((numbers.len() / columns, columns), numbers)?)
}

fn write_array(path: &Path, array: &Array2<f32>) -> Result<String, Box<dyn Error>> {
    let bytes: Vec<u8> = array.iter().flat_map(|number| number.to_le_bytes()).collect();
    std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok("ok".to_owned())
}
