//! What the fuzzers do with bytes. `fuzz/` runs these functions on bytes that it makes up, the
//! tests below on those that are kept in `fuzz/corpus`. Each panics where a promise is broken.

#[cfg(feature = "safetensors")]
mod damage;
#[cfg(feature = "safetensors")]
pub mod files;
pub mod gradients;
pub mod input;
pub mod kernels;
pub mod layers;
pub mod options;
#[cfg(feature = "serde")]
pub mod states;

type Target = fn(&[u8]);

/// Each with its name.
pub const TARGETS: &[(&str, Target)] = &[
    ("kernels", kernels::kernels),
    ("gradients", gradients::gradients),
    ("layers", layers::layers),
    ("options", options::options),
    #[cfg(feature = "safetensors")]
    ("files", files::files),
    #[cfg(feature = "serde")]
    ("states", states::states),
];

#[test]
fn kept_bytes_break_no_promise() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for &(name, run) in TARGETS {
        let files = std::fs::read_dir(corpus.join(name)).unwrap();
        files.for_each(|file| run(&std::fs::read(file.unwrap().path()).unwrap()));
    }
}

/// Bytes of a seed, by splitmix64.
pub fn bytes(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 56) as u8
    };
    (0..160).map(|_| next()).collect()
}

#[test]
fn random_bytes_break_no_promise() {
    let runs = std::env::var("FUZZ_RUNS").map_or(200, |runs| runs.parse().unwrap());
    for &(name, target) in TARGETS {
        for seed in 0..runs {
            if std::panic::catch_unwind(|| target(&bytes(seed))).is_err() {
                panic!("{name}: seed {seed}");
            }
        }
    }
}
