//! Attention transfer: fits the parameters of a kernel to exact attention on samples of a head.

use crate::attention::Attention;
use crate::attention::call::Head;
use crate::attention::gradient::HeadGradient;
use crate::attention::scratch::Scratch;
use crate::check;
use crate::distill::adam::Adam;
use crate::error::Error;
use crate::mask::Mask;
use crate::parameters::Parameters;
use crate::projection::Generator;
use crate::scalar::Scalar;
use core::ops::Range;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};

mod adam;
pub(crate) mod options;

use crate::distill::options::{DistillLoss, DistillOptions, DistillStep};

/// Queries, keys and values of one sequence of a head, as the kernel gets them: `[n, d]`, `[n, d]`
/// and `[n, d_v]`.
#[derive(Clone, Copy, Debug)]
pub struct DistillSample<'a, T> {
    /// Queries.
    pub q: ArrayView2<'a, T>,
    /// Keys.
    pub k: ArrayView2<'a, T>,
    /// Values.
    pub v: ArrayView2<'a, T>,
}

/// What [`distill`] found.
#[derive(Debug)]
pub struct Distilled<T> {
    /// The kernel with the parameters of the smallest validation loss.
    pub kernel: Box<dyn Attention<T>>,
    /// These parameters: for a map inside, `map.with_parameters(&parameters.of("map"))`.
    pub parameters: Parameters<T>,
    /// The losses of every step, before its change; the first are those of the kernel as it came.
    pub steps: Vec<DistillStep>,
    /// The step with the smallest validation loss. 0 says that nothing was better than the kernel
    /// as it came.
    pub best: usize,
}

impl<T> Distilled<T> {
    /// The validation loss of the best step by that of the kernel as it came: below one if
    /// distillation has helped.
    #[must_use]
    pub fn validation_ratio(&self) -> f64 {
        match (self.steps.get(self.best), self.steps.first()) {
            (Some(best), Some(first)) if first.validation > 0.0 => {
                best.validation / first.validation
            }
            _ => 1.0,
        }
    }
}

/// Fits the [parameters](Attention::parameters) of a kernel to another one's answers, mostly those
/// of exact softmax attention, on sampled sequences of a head: attention transfer (LoLCATs, Zhang
/// et al., arXiv 2410.10254, section 3.1; Hedgehog, arXiv 2402.04347, section 4.2).
///
/// Every step takes one sample at random and one step of Adam (Kingma and Ba, arXiv 1412.6980,
/// algorithm 1) from the gradient over the queries that are not held out for validation.
/// The kernel of the smallest validation loss is returned: never a worse one, by that measure, than
/// the kernel as it came. Weights of features stay at 0 or above, and a step that leads to
/// parameters that the kernel refuses is halved until they can be used.
///
/// ```
/// use dijiang::{DistillOptions, DistillSample, LearnedFeatures, LinearAttention, distill};
/// use dijiang::{DctFeatures, SoftmaxAttention};
/// use ndarray::Array2;
///
/// let x = |phase: f64| {
///     Array2::from_shape_fn((120, 8), |(t, i)| (phase + (t * (i + 1)) as f64 / 7.0).sin())
/// };
/// let (q, k, v) = (x(0.0), x(0.3), x(1.0));
/// let map = LearnedFeatures::from_map(&DctFeatures::<f64>::new(8, 16, 0)?)?;
/// let sample = DistillSample { q: q.view(), k: k.view(), v: v.view() };
/// let options = DistillOptions::new().steps(60);
/// let teacher = SoftmaxAttention::new(8)?;
/// let fitted = distill(&LinearAttention::new(map.clone()), &teacher, &[sample], options)?;
/// assert!(fitted.validation_ratio() < 0.9);
/// let map = map.with_parameters(&fitted.parameters.of("map"))?; // to be saved, or used elsewhere
/// # let _ = map;
/// # Ok::<(), dijiang::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::InvalidOption`] for options that cannot be used, and if the kernel has no parameters,
/// or none of the names that were chosen; [`Error::ZeroSize`] without samples;
/// [`Error::Unsupported`] if the kernel has no backward pass, or a cross entropy is asked of
/// weights that are not positive; those of the forward and backward passes.
pub fn distill<T: Scalar>(
    kernel: &dyn Attention<T>,
    teacher: &dyn Attention<T>,
    samples: &[DistillSample<'_, T>],
    options: DistillOptions,
) -> Result<Distilled<T>, Error> {
    distill_with(kernel, teacher, samples, options, |_| true)
}

/// As [`distill`], with a callback that is given the losses of every step, and ends the training
/// where it returns `false`.
///
/// # Errors
///
/// Those of [`distill`].
#[allow(clippy::cast_precision_loss)] // samples
pub fn distill_with<T: Scalar>(
    kernel: &dyn Attention<T>,
    teacher: &dyn Attention<T>,
    samples: &[DistillSample<'_, T>],
    options: DistillOptions,
    mut progress: impl FnMut(&DistillStep) -> bool,
) -> Result<Distilled<T>, Error> {
    options.check()?;
    check::at_least_one("samples", samples.len())?;
    let mut scratch = Scratch::new();
    let lessons = samples
        .iter()
        .map(|sample| Lesson::new(*sample, teacher, &options, &mut scratch))
        .collect::<Result<Vec<_>, _>>()?;
    let mut parameters = options.chosen(kernel.parameters())?;
    let mut kernel = kernel.with_parameters(&parameters)?;
    let mut adam = Adam::new(&parameters, &options);
    let mut generator = Generator::new(options.seed);
    let (mut steps, mut best, mut kept) = (Vec::new(), 0, parameters.clone());
    let mut gradient = parameters.zeros_like();
    for index in 0..=options.steps {
        let chosen = generator.index(lessons.len());
        gradient.iter_mut().for_each(|(_, x)| x.fill(T::zero()));
        // validation is over all samples, so that steps can be compared
        let (mut training, mut validation) = (0.0, 0.0);
        for (i, lesson) in lessons.iter().enumerate() {
            let gradient = (i == chosen).then_some(&mut gradient);
            let losses = lesson.losses(&*kernel, gradient, &mut scratch)?;
            validation += losses[1] / lessons.len() as f64;
            if i == chosen {
                training = losses[0];
            }
        }
        let step = DistillStep { index, training, validation };
        steps.push(step);
        if validation < steps[best].validation {
            (best, kept) = (index, parameters.clone());
        }
        let is_over = index == options.steps || index - best >= options.patience;
        if !progress(&step) || is_over {
            break;
        }
        let change = adam.step(&gradient);
        (kernel, parameters) = changed(&*kernel, &parameters, &change)?;
    }
    let kernel = kernel.with_parameters(&kept)?;
    Ok(Distilled { kernel, parameters: kept, steps, best })
}

/// A kernel with its parameters.
type Fitted<T> = (Box<dyn Attention<T>>, Parameters<T>);

/// The kernel after a change of its parameters, or the largest part of it that can be used.
fn changed<T: Scalar>(
    kernel: &dyn Attention<T>,
    parameters: &Parameters<T>,
    change: &Parameters<T>,
) -> Result<Fitted<T>, Error> {
    let mut factor = T::one();
    for _ in 0..16 {
        let mut tried = parameters.clone();
        tried.add_scaled(factor, change)?;
        for (name, array) in tried.iter_mut() {
            if name == "weights" || name.ends_with(".weights") {
                array.mapv_inplace(|weight| weight.max(T::zero()));
            }
        }
        match kernel.with_parameters(&tried) {
            Ok(kernel) => return Ok((kernel, tried)),
            Err(Error::InvalidOption { .. } | Error::NotFinite { .. }) => {
                factor *= T::from_f64(0.5);
            }
            Err(error) => return Err(error),
        }
    }
    Ok((kernel.with_parameters(parameters)?, parameters.clone()))
}

/// A sample with the teacher's answers.
#[derive(Debug)]
struct Lesson<'a, T> {
    sample: DistillSample<'a, T>,
    loss: DistillLoss,
    mask: Mask,
    /// What takes the place of the values: these, or the unit matrix, which shows the weights.
    values: Array2<T>,
    /// The teacher's answers.
    target: Array2<T>,
    /// Rows that the loss is taken over, and rows that are held out.
    rows: [Range<usize>; 2],
}

impl<'a, T: Scalar> Lesson<'a, T> {
    fn new(
        sample: DistillSample<'a, T>,
        teacher: &dyn Attention<T>,
        options: &DistillOptions,
        scratch: &mut Scratch<T>,
    ) -> Result<Self, Error> {
        let n = sample.q.nrows();
        check::at_least_one("q rows", n)?;
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        #[allow(clippy::cast_sign_loss)] // a share of n
        let held_out = ((n as f64 * options.validation).round() as usize).min(n - 1);
        let values = match options.loss {
            DistillLoss::Output => sample.v.to_owned(),
            DistillLoss::CrossEntropy => {
                check::array("q rows", n, n)?;
                Array2::eye(n)
            }
        };
        let mut target = Array2::zeros((n, values.ncols()));
        let DistillSample { q, k, .. } = sample;
        forward(teacher, [q, k, values.view()], options.mask, target.view_mut(), scratch)?;
        // without rows to validate on, the loss itself is what tells
        let rows = if held_out == 0 { [0..n, 0..n] } else { [0..n - held_out, n - held_out..n] };
        let (loss, mask) = (options.loss, options.mask);
        Ok(Self { sample, loss, mask, values, target, rows })
    }

    /// The losses over the rows for training and for validation; adds the gradient of the first.
    fn losses(
        &self,
        kernel: &dyn Attention<T>,
        gradient: Option<&mut Parameters<T>>,
        scratch: &mut Scratch<T>,
    ) -> Result<[f64; 2], Error> {
        let DistillSample { q, k, .. } = self.sample;
        let mut out = Array2::zeros(self.target.dim());
        forward(kernel, [q, k, self.values.view()], self.mask, out.view_mut(), scratch)?;
        let mut d_out = Array2::zeros(out.dim());
        let mut losses = [0.0; 2];
        for (loss, (rows, is_training)) in
            losses.iter_mut().zip(self.rows.iter().zip([true, false]))
        {
            *loss = self.loss_of(&out, rows.clone(), is_training.then_some(&mut d_out))?;
        }
        let Some(gradient) = gradient else { return Ok(losses) };
        let [mut d_q, mut d_k] = [q, k].map(|x| Array2::zeros(x.dim()));
        let mut d_v = Array2::zeros(self.values.dim());
        let gradients = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
        let head = HeadGradient::new([q, k, self.values.view()], d_out.view(), gradients);
        kernel.backward_heads(&mut [head.with_parameters(gradient)], self.mask, scratch)?;
        Ok(losses)
    }

    /// The loss over some rows, and the gradient by the outputs.
    #[allow(clippy::cast_precision_loss)] // rows
    fn loss_of(
        &self,
        out: &Array2<T>,
        rows: Range<usize>,
        mut d_out: Option<&mut Array2<T>>,
    ) -> Result<f64, Error> {
        let count = rows.len().max(1) as f64;
        let mut size = 0.0;
        if self.loss == DistillLoss::Output {
            for t in rows.clone() {
                size += self.target.row(t).iter().map(|x| x.as_f64().powi(2)).sum::<f64>();
            }
            size = size.max(f64::MIN_POSITIVE);
        }
        let mut loss = 0.0;
        for t in rows {
            let mut d_row = d_out.as_mut().map(|d_out| d_out.index_axis_mut(Axis(0), t));
            for (c, (found, target)) in out.row(t).iter().zip(self.target.row(t)).enumerate() {
                let (found, target) = (found.as_f64(), target.as_f64());
                let (term, slope) = match self.loss {
                    DistillLoss::Output => {
                        ((found - target).powi(2) / size, 2.0 * (found - target) / size)
                    }
                    DistillLoss::CrossEntropy if target == 0.0 => (0.0, 0.0),
                    DistillLoss::CrossEntropy if found > 0.0 => {
                        let share = target / count;
                        (share * (libm::log(target) - libm::log(found)), -share / found)
                    }
                    DistillLoss::CrossEntropy => return Err(NOT_POSITIVE),
                };
                loss += term;
                if let Some(d_row) = &mut d_row {
                    d_row[c] = T::from_f64(slope);
                }
            }
        }
        Ok(loss)
    }
}

const NOT_POSITIVE: Error = Error::Unsupported {
    what: "a cross entropy of weights that are not positive",
    why: "the kernel gives a token that the teacher sees no weight; use `DistillLoss::Output`",
};

fn forward<T: Scalar>(
    kernel: &dyn Attention<T>,
    [q, k, v]: [ArrayView2<'_, T>; 3],
    mask: Mask,
    out: ArrayViewMut2<'_, T>,
    scratch: &mut Scratch<T>,
) -> Result<(), Error> {
    kernel.forward_heads(&mut [Head::new(q, k, v, out)], mask, scratch)
}
