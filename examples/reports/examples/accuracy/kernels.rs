//! What is measured.

use crate::oracle::{Exact, Recurrence, softmax};
use crate::text::{HEAD_DIM, Text};
use dijiang::{
    Attention, DctFeatures, EluFeatures, Error, FeatureMap, LinearAttention, Mask, Performer,
    Scalar, SoftmaxAttention,
};
use ndarray::{Array2, s};

const FEATURES: usize = 16;
const DECAY: f64 = 0.999;

/// Answers that are looked at for each power of ten.
const SAMPLES: f64 = 40.0;

/// Tokens of the calls, in turn.
const CALLS: [usize; 4] = [1, 7, 120, 1];

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kernel {
    Softmax,
    Performer,
    Dct,
    Elu,
    Decaying,
}

impl Kernel {
    pub const ALL: [Self; 5] =
        [Self::Softmax, Self::Performer, Self::Dct, Self::Elu, Self::Decaying];

    pub fn name(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::Performer => "performer",
            Self::Dct => "dct",
            Self::Elu => "elu",
            Self::Decaying => "performer, decay .999",
        }
    }

    /// The largest errors between each length and the one before.
    pub fn errors<T: Scalar>(self, text: &Text, lengths: &[usize]) -> Result<Vec<f64>, Error> {
        let performer = Performer::<T>::new(HEAD_DIM, FEATURES, 7)?;
        let wide = Performer::<f64>::new(HEAD_DIM, FEATURES, 7)?;
        match self {
            Self::Softmax => last_rows::<T>(text, lengths),
            Self::Performer => streamed(LinearAttention::new(performer), &wide, 1.0, text, lengths),
            Self::Dct => {
                let map = DctFeatures::<T>::new(HEAD_DIM, FEATURES, 7)?;
                let wide = DctFeatures::<f64>::new(HEAD_DIM, FEATURES, 7)?;
                streamed(LinearAttention::new(map), &wide, 1.0, text, lengths)
            }
            Self::Elu => {
                let map = EluFeatures::<T>::new(HEAD_DIM)?;
                let wide = EluFeatures::<f64>::new(HEAD_DIM)?;
                streamed(LinearAttention::new(map), &wide, 1.0, text, lengths)
            }
            Self::Decaying => {
                let kernel = LinearAttention::new(performer).with_decay(DECAY);
                streamed(kernel, &wide, DECAY, text, lengths)
            }
        }
    }
}

fn error<T: Scalar>(exact: Exact, found: T) -> f64 {
    exact.error(found.as_f64(), T::epsilon().as_f64())
}

/// Exact softmax, asked for the last row of texts of these lengths.
fn last_rows<T: Scalar>(text: &Text, lengths: &[usize]) -> Result<Vec<f64>, Error> {
    let kernel = SoftmaxAttention::<T>::new(HEAD_DIM)?;
    let longest = lengths.last().copied().unwrap_or(0);
    let [k, v] = [1, 2].map(|which| text.read::<T>(which, 0, longest));
    let mut errors = Vec::new();
    for &n in lengths {
        let q = text.read::<T>(0, n - 1, 1);
        let rows = s![..n, ..];
        let out = kernel.forward(q.view(), k.slice(rows), v.slice(rows), Mask::CausalTail)?;
        errors.push(error(softmax(text, n), out[[0, 0]]));
    }
    Ok(errors)
}

/// A stream of tokens in pieces.
fn streamed<T: Scalar, F: FeatureMap<T> + 'static>(
    kernel: LinearAttention<F>,
    map: &dyn FeatureMap<f64>,
    decay: f64,
    text: &Text,
    lengths: &[usize],
) -> Result<Vec<f64>, Error> {
    let mut oracle = Recurrence::new(map, decay, text)?;
    let mut stream = kernel.stream(1)?;
    let (mut tokens, mut sample, mut errors) = (0, 1.0_f64, vec![0.0_f64; lengths.len()]);
    for (i, &length) in lengths.iter().enumerate() {
        for &call in CALLS.iter().cycle() {
            let n = call.min(length - tokens);
            let [q, k, v] = [0, 1, 2].map(|which| text.read::<T>(which, tokens, n));
            let mut out = Array2::from_elem((n, 1), T::nan());
            stream.extend(q.view(), k.view(), v.view(), out.view_mut())?;
            (tokens..tokens + n).for_each(|t| oracle.step(text, t));
            tokens += n;
            if tokens as f64 >= sample || tokens == length {
                sample = tokens as f64 * 10.0_f64.powf(1.0 / SAMPLES);
                errors[i] = errors[i].max(error(oracle.answer(tokens - 1), out[[n - 1, 0]]));
            }
            if tokens == length {
                break;
            }
        }
    }
    Ok(errors)
}
