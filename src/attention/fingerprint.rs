//! What tells kernels of the same sizes apart, kept beside the saved state of a stream.
#![allow(clippy::cast_precision_loss)] // sizes, and numbers of 53 bits

use crate::error::Error;
use crate::features::FeatureMap;
use crate::scalar::Scalar;
use ndarray::{Array1, Array2};
use std::borrow::Cow;

/// The parameters of a kernel in a few numbers: its scale, decays, frequencies, and what its
/// feature map makes of two fixed vectors. A [`StreamState`](crate::StreamState) holds one, and
/// only a stream whose kernel has the same takes the state.
///
/// It tells apart what was meant to differ, and is no proof: long lists of parameters are kept as
/// a few weighted sums, and what is computed may differ by rounding from processor to processor.
///
/// ```
/// use dijiang::Fingerprint;
///
/// let own = Fingerprint::new().with("scale", [0.125]);
/// assert!(own.check(&Fingerprint::new().with("scale", [0.125])).is_ok());
/// let error = own.check(&Fingerprint::new().with("scale", [1.0])).unwrap_err();
/// assert!(error.to_string().contains("scale"));
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Fingerprint {
    parts: Vec<Part>,
}

/// One parameter, or a list of them.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
struct Part {
    name: Cow<'static, str>,
    numbers: Vec<f64>,
    /// What rounding may change, as a share of the largest number.
    tolerance: f64,
}

/// Lists up to this length are kept as they are.
const SHORT: usize = 4;

/// What may differ between parameters that are not computed by the inner loops.
const ROUNDING: f64 = 1e-9;

impl Fingerprint {
    /// Of a kernel without parameters.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With one more parameter, or list of them. The order counts.
    #[must_use]
    pub fn with(
        self,
        name: impl Into<Cow<'static, str>>,
        numbers: impl IntoIterator<Item = f64>,
    ) -> Self {
        // formats of text have no word for what is not finite: log decays that forget all
        let finite = |x: f64| if x.is_finite() { x } else { -1e6 };
        let mut numbers: Vec<f64> = numbers.into_iter().map(finite).collect();
        if numbers.len() > SHORT {
            let long = numbers.len() as f64;
            numbers = [long].into_iter().chain(sums(numbers.into_iter())).collect();
        }
        self.with_part(Part { name: name.into(), numbers, tolerance: ROUNDING })
    }

    /// With what a feature map makes of two fixed vectors, as queries and as keys.
    ///
    /// # Errors
    ///
    /// Those of the map.
    pub fn with_map<T: Scalar>(self, map: &dyn FeatureMap<T>) -> Result<Self, Error> {
        let (d, m) = (map.head_dim(), map.num_features());
        let x = Array2::from_shape_fn((2, d), |(row, i)| {
            T::from_f64(factor(row, i) * (2.0 / (d as f64)).sqrt())
        });
        let mut numbers = Vec::new();
        for side in 0..2 {
            let (mut values, mut log_scale) = (Array2::zeros((2, m)), Array1::zeros(2));
            let (out, scales) = (values.view_mut(), log_scale.view_mut());
            match side {
                0 => map.map_queries(x.view(), out, scales)?,
                _ => map.map_keys(x.view(), out, scales)?,
            }
            for (features, log_scale) in values.outer_iter().zip(log_scale) {
                let largest = features.iter().fold(T::zero(), |l, x| l.max(x.abs())).as_f64();
                if largest > 0.0 {
                    numbers.push(log_scale.as_f64() + largest.ln());
                    numbers.extend(sums(features.iter().map(|x| x.as_f64() / largest)));
                }
            }
        }
        let tolerance = T::epsilon().as_f64() * 4096.0;
        Ok(self.with_part(Part { name: "feature map".into(), numbers, tolerance }))
    }

    fn with_part(mut self, part: Part) -> Self {
        self.parts.push(part);
        self
    }

    /// With all that another one has, after its own.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.parts.extend(other.parts);
        self
    }

    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Checks that `saved` is of the same kernel; one that says nothing is taken on trust.
    ///
    /// # Errors
    ///
    /// [`Error::State`], with the parameter that differs.
    pub fn check(&self, saved: &Self) -> Result<(), Error> {
        if saved.is_empty() && !self.is_empty() {
            return Ok(());
        }
        for (own, saved) in self.parts.iter().zip(&saved.parts) {
            if !own.agrees(saved) {
                return Err(own.differs(saved));
            }
        }
        if self.parts.len() == saved.parts.len() {
            return Ok(());
        }
        Err(Error::State { which: "parameters", expected: self.names(), found: saved.names() })
    }

    /// Checks that `saved` ends with this one, for kernels with one inside; returns what is before
    /// it, which is for the kernel inside.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn check_end(&self, saved: &Self) -> Result<Self, Error> {
        if saved.is_empty() {
            return Ok(Self::new());
        }
        let (before, end) =
            saved.parts.split_at(saved.parts.len().saturating_sub(self.parts.len()));
        self.check(&Self { parts: end.to_vec() })?;
        Ok(Self { parts: before.to_vec() })
    }

    fn names(&self) -> String {
        let names: Vec<_> = self.parts.iter().map(|part| &*part.name).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    }
}

impl Part {
    fn agrees(&self, saved: &Self) -> bool {
        let size = self.numbers.iter().chain(&saved.numbers).fold(0.0_f64, |m, x| m.max(x.abs()));
        self.name == saved.name
            && self.numbers.len() == saved.numbers.len()
            && self
                .numbers
                .iter()
                .zip(&saved.numbers)
                .all(|(a, b)| (a - b).abs() <= self.tolerance * size)
    }

    fn differs(&self, saved: &Self) -> Error {
        let which = match self.name {
            Cow::Borrowed(name) => name,
            Cow::Owned(_) => "parameter",
        };
        if self.name == saved.name {
            let (expected, found) = match (&*self.numbers, &*saved.numbers) {
                ([own], [other]) => (own.to_string(), other.to_string()),
                ([], _) => ("none".to_owned(), "one".to_owned()),
                (_, []) => ("one".to_owned(), "none".to_owned()),
                _ => ("(its own)".to_owned(), "(another one)".to_owned()),
            };
            Error::State { which, expected, found }
        } else {
            let found = format!("a parameter `{}`", saved.name);
            Error::State { which: "parameters", expected: format!("`{}`", self.name), found }
        }
    }
}

/// A few sums of a list by which it is known again, each with weights of its own, and the sum of
/// absolute values, which gives the size of the others.
fn sums(list: impl Iterator<Item = f64>) -> [f64; 4] {
    let mut sums = [0.0; 4];
    for (i, x) in list.enumerate() {
        for (which, sum) in sums[..3].iter_mut().enumerate() {
            *sum += factor(which, i) * x;
        }
        sums[3] += x.abs();
    }
    sums
}

/// Fixed numbers from −1 to 1 that look random (splitmix64).
fn factor(which: usize, i: usize) -> f64 {
    let mut z = (i as u64 * 4 + which as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::performer::Performer;

    #[test]
    fn lists_are_known_again_by_every_element_and_their_order() {
        let list: Vec<f64> = (0..100).map(|i| f64::from(i).sin()).collect();
        let own = Fingerprint::new().with("list", list.clone());
        assert_eq!(own.check(&Fingerprint::new().with("list", list.clone())), Ok(()));
        for i in 0..100 {
            let mut other = list.clone();
            other[i] += 1e-3;
            assert!(own.check(&Fingerprint::new().with("list", other)).is_err(), "{i}");
            let mut other = list.clone();
            other.swap(i, (i + 1) % 100);
            assert!(own.check(&Fingerprint::new().with("list", other)).is_err(), "{i}");
        }
        assert!(own.check(&Fingerprint::new().with("list", list[..99].to_vec())).is_err());
        let infinite = Fingerprint::new().with("decay", [f64::NEG_INFINITY]);
        assert!(infinite.check(&Fingerprint::new().with("decay", [-1.0])).is_err());
        assert!(infinite.check(&infinite.clone()).is_ok());
    }

    #[test]
    fn every_seed_is_another_map() {
        let of = |seed| {
            let map = Performer::<f32>::new(6, 10, seed).unwrap();
            Fingerprint::new().with_map(&map).unwrap()
        };
        for seed in 1..200 {
            assert!(of(0).check(&of(seed)).is_err());
        }
        assert_eq!(of(3).check(&of(3)), Ok(()));
    }

    #[test]
    fn what_a_kernel_inside_adds_is_taken_off() {
        let inner = Fingerprint::new().with("scale", [1.0]);
        let outer = Fingerprint::new().with("base", [1e4]);
        let saved = inner.clone().and(outer.clone());
        assert_eq!(outer.check_end(&saved), Ok(inner.clone()));
        assert!(Fingerprint::new().with("base", [5e5]).check_end(&saved).is_err());
        assert!(outer.check_end(&inner).is_err());
        assert_eq!(outer.check_end(&Fingerprint::new()), Ok(Fingerprint::new()));
    }
}
