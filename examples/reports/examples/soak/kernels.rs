//! What is run, and what is known of its answers.

use crate::tokens::{HEAD_DIM, Tokens, VALUE_DIM};
use dijiang::attention::naive::linear::Recurrence;
use dijiang::{
    Attention, DctFeatures, Error, Far, FeatureMap, HybridAttention, LinearAttention, Merged,
    Performer, SoftmaxAttention, Ward,
};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};
use reports::lengths::features;
use std::sync::Arc;

/// A kernel of constant memory.
pub struct Subject {
    pub name: &'static str,
    pub kernel: Box<dyn Attention<f32>>,
    known: Known,
}

/// How its answers are known.
#[derive(Clone)]
enum Known {
    /// By the recurrence, over these features, with this decay.
    Recurrence(Arc<dyn FeatureMap<f64>>, f64),
    /// As softmax attention over the last tokens.
    Window(usize),
    /// Of a query of zeros: the mean of all values, for every token weighs the same.
    Mean,
    /// That they are weighted means of the values.
    Hull,
}

const WINDOW: usize = 64;

/// `1/√HEAD_DIM`
const SCALE: f64 = 0.25;

/// All of them.
pub fn all() -> Result<Vec<Subject>, Error> {
    let performer = Performer::<f32>::new(HEAD_DIM, 32, 7)?;
    let dct = DctFeatures::<f32>::new(HEAD_DIM, 32, 7)?;
    let wide: [Arc<dyn FeatureMap<f64>>; 2] =
        [Arc::new(Performer::new(HEAD_DIM, 32, 7)?), Arc::new(DctFeatures::new(HEAD_DIM, 32, 7)?)];
    let [wide_performer, wide_dct] = wide;
    let decay = 0.9999;
    let window = || HybridAttention::builder(HEAD_DIM).window(WINDOW).sinks(0);
    Ok(vec![
        Subject {
            name: "performer",
            kernel: Box::new(LinearAttention::new(performer)),
            known: Known::Recurrence(wide_performer, 1.0),
        },
        Subject {
            name: "dct with decay",
            kernel: Box::new(LinearAttention::new(dct).with_decay(decay)),
            known: Known::Recurrence(wide_dct, decay),
        },
        Subject {
            name: "window",
            kernel: Box::new(window().far(Far::none()).build()?),
            known: Known::Window(WINDOW),
        },
        Subject {
            name: "softmax with a window",
            kernel: Box::new(SoftmaxAttention::new(HEAD_DIM)?.with_window(WINDOW)?),
            known: Known::Window(WINDOW),
        },
        Subject {
            name: "merging by Ward",
            kernel: Box::new(window().far(Ward::new(64).block(16)).build()?),
            known: Known::Mean,
        },
        Subject {
            name: "merging",
            kernel: Box::new(window().far(Merged::new(64).block(16)).build()?),
            known: Known::Hull,
        },
    ])
}

impl Subject {
    /// An oracle that has seen nothing.
    pub fn oracle(&self) -> Oracle {
        Oracle { known: self.known.clone(), tokens: 0, state: None, sums: [0.0; VALUE_DIM] }
    }

    /// Whether answers are known of queries of zeros only.
    pub fn asks_nothing(&self) -> bool {
        matches!(self.known, Known::Mean)
    }
}

/// What is known, in `f64`.
pub struct Oracle {
    known: Known,
    tokens: usize,
    state: Option<Recurrence>,
    sums: [f64; VALUE_DIM],
}

fn wide(x: ArrayView2<'_, f32>) -> Array2<f64> {
    x.mapv(f64::from)
}

impl Oracle {
    /// Takes keys and values.
    pub fn absorb(&mut self, k: ArrayView2<'_, f32>, v: ArrayView2<'_, f32>) -> Result<(), Error> {
        self.tokens += k.nrows();
        match &self.known {
            Known::Recurrence(map, decay) => {
                let features = features(&**map, &wide(k), SCALE, true)?;
                let new = || Recurrence::new(map.num_features(), VALUE_DIM);
                let state = self.state.get_or_insert_with(new);
                for (k, v) in features.outer_iter().zip(wide(v).outer_iter()) {
                    state.step(k, v, |_| *decay);
                }
            }
            Known::Window(_) | Known::Hull => {}
            Known::Mean => {
                for row in v.outer_iter() {
                    self.sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
                }
            }
        }
        Ok(())
    }

    /// The answer to a query of the token that was absorbed last; where only bounds are known, what
    /// lies within them next to `found`.
    pub fn answer(
        &self,
        q: ArrayView1<'_, f32>,
        found: ArrayView1<'_, f32>,
        text: &Tokens,
    ) -> Result<Array1<f64>, Error> {
        match &self.known {
            Known::Recurrence(map, _) => {
                let features = features(&**map, &wide(q.insert_axis(Axis(0))), SCALE, false)?;
                let state = self.state.as_ref().map(|state| state.read_normalized(features.row(0)));
                Ok(state.unwrap_or_else(|| Array1::zeros(VALUE_DIM)))
            }
            Known::Window(window) => {
                let dot = |k: ArrayView1<'_, f32>| -> f64 {
                    q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
                };
                let seen = self.tokens.saturating_sub(*window)..self.tokens;
                let (mut total, mut sum) = (0.0, Array1::zeros(VALUE_DIM));
                for t in seen {
                    let weight = (SCALE * dot(text.row(1, t))).exp();
                    total += weight;
                    sum.scaled_add(weight, &text.row(2, t).mapv(f64::from));
                }
                Ok(sum / total)
            }
            Known::Hull => Ok(text.nearest(found)),
            Known::Mean => Ok(Array1::from_iter(self.sums.map(|sum| sum / self.tokens as f64))),
        }
    }
}
