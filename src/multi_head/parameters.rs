//! The parameters of a layer: those of its kernels.

use crate::error::Error;
use crate::multi_head::MultiHead;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use std::sync::Arc;

impl<T: Scalar> MultiHead<T> {
    /// The numbers of the kernels that can be trained, by name: `heads.3.map.projection` is that
    /// of query head 3. A kernel that several query heads share (the same `Arc`, as after
    /// [`new`](Self::new)) is here once, by the first of them.
    ///
    /// ```
    /// use dijiang::{LinearAttention, MultiHead, Performer, SoftmaxAttention};
    /// use std::sync::Arc;
    ///
    /// let shared = LinearAttention::new(Performer::<f32>::new(8, 16, 0)?);
    /// let layer = MultiHead::new(shared.clone(), 4, 2)?;
    /// let names: Vec<_> = layer.parameters().names().map(str::to_owned).collect();
    /// assert_eq!(names, ["heads.0.map.projection", "heads.0.map.weights"]);
    ///
    /// // one kernel for each kv head
    /// let sinks = SoftmaxAttention::new(8)?.with_sink_logits(vec![0.5])?;
    /// let layer = MultiHead::per_kv_head(vec![Arc::new(sinks), Arc::new(shared)], 4)?;
    /// let names: Vec<_> = layer.parameters().names().map(str::to_owned).collect();
    /// let expected = ["heads.0.sink_logits", "heads.2.map.projection", "heads.2.map.weights"];
    /// assert_eq!(names, expected);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn parameters(&self) -> Parameters<T> {
        let firsts = (0..self.query_heads()).filter(|&head| self.first_with_kernel(head) == head);
        firsts.fold(Parameters::new(), |all, head| {
            all.and(self.kernels[head].parameters().under(&place(head)))
        })
    }

    /// The same layer with other numbers in the place of those of these names, in every query head
    /// that shares them.
    ///
    /// ```
    /// use dijiang::{LinearAttention, Mask, MultiHead, Performer};
    /// use ndarray::Array4;
    ///
    /// let layer = MultiHead::new(LinearAttention::new(Performer::<f32>::new(8, 16, 0)?), 4, 2)?;
    /// let q = Array4::from_shape_fn((1, 4, 10, 8), |(_, h, t, c)| ((h + t * c) as f32).sin());
    /// let k = Array4::from_shape_fn((1, 2, 10, 8), |(_, h, t, c)| ((h + t + c) as f32).cos());
    /// let d_out = Array4::ones((1, 4, 10, 8));
    /// let d = layer.backward(q.view(), k.view(), k.view(), Mask::Causal, None, d_out.view())?;
    /// // a step down the gradient
    /// let mut parameters = layer.parameters();
    /// parameters.add_scaled(-0.01, &d.parameters)?;
    /// let layer = layer.with_parameters(&parameters)?;
    /// assert_eq!(layer.parameters(), parameters);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no parameter of a name, or it has another shape, and those
    /// of [`Attention::with_parameters`](crate::Attention::with_parameters).
    pub fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Self, Error> {
        self.parameters().check_names(parameters)?;
        let mut kernels = self.kernels.clone();
        for head in 0..kernels.len() {
            let first = self.first_with_kernel(head);
            if first < head {
                kernels[head] = Arc::clone(&kernels[first]);
                continue;
            }
            let own = parameters.of(&place(head));
            if !own.is_empty() {
                kernels[head] = Arc::from(self.kernels[head].with_parameters(&own)?);
            }
        }
        Ok(Self { kernels, ..self.clone() })
    }

    /// The first query head with the kernel of this one.
    pub(super) fn first_with_kernel(&self, head: usize) -> usize {
        let same = |other: &Arc<_>| Arc::ptr_eq(other, &self.kernels[head]);
        self.kernels.iter().position(same).unwrap_or(head)
    }
}

/// Where the parameters of a query head stand.
pub(super) fn place(head: usize) -> String {
    format!("heads.{head}")
}
