//! Numbers that can be trained, by name.

use crate::error::Error;
use crate::scalar::Scalar;
use core::fmt::Write;
use ndarray::{
    Array1, Array2, ArrayD, ArrayView1, ArrayView2, ArrayViewD, ArrayViewMut2, Ix1, Ix2,
};
use std::collections::BTreeMap;

/// Arrays of numbers by name, in the order of the names: the parameters of a map or a kernel, or
/// the gradient of a loss by them.
///
/// Names are those under which the type is saved; what stands inside another one has the name of
/// its place before its own, as in `map.projection`.
///
/// ```
/// use dijiang::{FeatureMap, Performer};
///
/// let map = Performer::<f32>::new(8, 16, 0)?;
/// let mut parameters = map.parameters();
/// assert_eq!(parameters.names().collect::<Vec<_>>(), ["projection", "weights"]);
/// // a step down some gradient
/// let mut gradient = parameters.zeros_like();
/// gradient.get_mut("weights").unwrap().fill(0.5);
/// parameters.add_scaled(-0.1, &gradient)?;
/// let map = map.with_parameters(&parameters)?;
/// assert_eq!(map.weights()[3], 0.95);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(bound(serialize = "T: serde::Serialize", deserialize = "T: serde::Deserialize<'de>"))
)]
pub struct Parameters<T> {
    arrays: BTreeMap<String, ArrayD<T>>,
}

impl<T> Default for Parameters<T> {
    fn default() -> Self {
        Self { arrays: BTreeMap::new() }
    }
}

impl<T> Parameters<T> {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an array, or puts it in the place of the one of this name.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, array: ArrayD<T>) -> Self {
        self.insert(name, array);
        self
    }

    /// Adds an array, or puts it in the place of the one of this name.
    pub fn insert(&mut self, name: impl Into<String>, array: ArrayD<T>) {
        self.arrays.insert(name.into(), array);
    }

    /// The array of a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<ArrayViewD<'_, T>> {
        self.arrays.get(name).map(|array| array.view())
    }

    /// The array of a name.
    #[must_use]
    pub fn get_mut(&mut self, name: &str) -> Option<&mut ArrayD<T>> {
        self.arrays.get_mut(name)
    }

    /// The names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.arrays.keys().map(String::as_str)
    }

    /// Every array with its name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &ArrayD<T>)> {
        self.arrays.iter().map(|(name, array)| (name.as_str(), array))
    }

    /// Every array with its name.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut ArrayD<T>)> {
        self.arrays.iter_mut().map(|(name, array)| (name.as_str(), array))
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.arrays.is_empty()
    }

    /// Arrays.
    #[must_use]
    pub fn len(&self) -> usize {
        self.arrays.len()
    }

    /// Numbers of all arrays.
    #[must_use]
    pub fn floats(&self) -> usize {
        self.arrays.values().map(ArrayD::len).sum()
    }

    /// The same under longer names: `place`, a point, and the name.
    #[must_use]
    pub fn under(self, place: &str) -> Self {
        let longer = |(name, array)| (format!("{place}.{name}"), array);
        Self { arrays: self.arrays.into_iter().map(longer).collect() }
    }

    /// The same with those of another one.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.arrays.extend(other.arrays);
        self
    }
}

impl<T> FromIterator<(String, ArrayD<T>)> for Parameters<T> {
    fn from_iter<I: IntoIterator<Item = (String, ArrayD<T>)>>(arrays: I) -> Self {
        Self { arrays: arrays.into_iter().collect() }
    }
}

impl<T: Clone> Parameters<T> {
    /// What stands [under](Self::under) a place, by the shorter names.
    #[must_use]
    pub fn of(&self, place: &str) -> Self {
        let shorter = |(name, array): (&String, &ArrayD<T>)| {
            let name = name.strip_prefix(place)?.strip_prefix('.')?;
            Some((name.to_owned(), array.clone()))
        };
        Self { arrays: self.arrays.iter().filter_map(shorter).collect() }
    }
}

impl<T: Scalar> Parameters<T> {
    /// Zeros under the same names, of the same shapes: where a gradient begins.
    #[must_use]
    pub fn zeros_like(&self) -> Self {
        let zeros =
            |(name, array): (&String, &ArrayD<T>)| (name.clone(), ArrayD::zeros(array.dim()));
        Self { arrays: self.arrays.iter().map(zeros).collect() }
    }

    /// Adds `factor` times the arrays of another one, each to that of its name; those that it does
    /// not have stay.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no array of a name, or it has another shape. Nothing has
    /// changed then.
    pub fn add_scaled(&mut self, factor: T, other: &Self) -> Result<(), Error> {
        self.check_names(other)?;
        for (name, array) in &other.arrays {
            if let Some(sum) = self.arrays.get_mut(name) {
                sum.zip_mut_with(array, |sum, &x| *sum += factor * x);
            }
        }
        Ok(())
    }

    /// Puts the arrays of another one in the places of those of their names; the rest stays.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no array of a name, or it has another shape. Nothing has
    /// changed then.
    pub fn set(&mut self, other: &Self) -> Result<(), Error> {
        self.check_names(other)?;
        self.arrays.extend(other.arrays.iter().map(|(name, array)| (name.clone(), array.clone())));
        Ok(())
    }

    /// Fails unless all are finite: finite input led out of the range of `T`.
    pub(crate) fn check_gradients(&self) -> Result<(), Error> {
        if self.arrays.values().flatten().all(|x| x.is_finite()) {
            Ok(())
        } else {
            Err(Error::Overflow { which: "the gradient by a parameter", row: 0 })
        }
    }

    /// Fails unless every array of `other` has a place here.
    pub(crate) fn check_names(&self, other: &Self) -> Result<(), Error> {
        for (name, array) in &other.arrays {
            let Some(own) = self.arrays.get(name) else {
                let mut names = String::new();
                for name in self.names() {
                    let _ = write!(names, "{}`{name}`", if names.is_empty() { "" } else { ", " });
                }
                let names = if names.is_empty() { "none at all".to_owned() } else { names };
                let (name, found) = (name.clone(), "not there".to_owned());
                return Err(Error::Parameter { name, found, needed: format!("one of {names}") });
            };
            check_shape(name, array, own.shape())?;
        }
        Ok(())
    }

    /// The gradient by a matrix, to add to, if it is asked for.
    pub(crate) fn matrix_mut(
        &mut self,
        name: &str,
        matrix: &Array2<T>,
    ) -> Result<Option<ArrayViewMut2<'_, T>>, Error> {
        let Some(array) = self.arrays.get_mut(name) else { return Ok(None) };
        check_shape(name, array, matrix.shape())?;
        Ok(array.view_mut().into_dimensionality().ok())
    }

    /// A vector to add to, if it is there.
    pub(crate) fn vector_mut(&mut self, name: &str) -> Option<&mut [T]> {
        self.get_mut(name)?.as_slice_mut()
    }

    /// A copy of a vector that is there.
    pub(crate) fn vector(&self, name: &str) -> Array1<T> {
        let view = self.get(name).and_then(|view| view.into_dimensionality::<Ix1>().ok());
        view.unwrap_or_else(|| ArrayView1::from(&[])).to_owned()
    }

    /// A matrix that is there.
    pub(crate) fn matrix(&self, name: &str) -> ArrayView2<'_, T> {
        let view = self.get(name).and_then(|view| view.into_dimensionality::<Ix2>().ok());
        view.unwrap_or_else(|| ArrayView2::from(&[[]; 0]))
    }
}

/// Fails unless an array has the shape of the parameter.
fn check_shape<T>(name: &str, array: &ArrayD<T>, shape: &[usize]) -> Result<(), Error> {
    if array.shape() == shape {
        return Ok(());
    }
    let [found, needed] = [array.shape(), shape].map(|shape| format!("of shape {shape:?}"));
    Err(Error::Parameter { name: name.to_owned(), found, needed })
}
