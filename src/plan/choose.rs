//! The settings of all heads that cost least within a total.

/// One setting of one head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    /// In units of the budget.
    pub(crate) size: usize,
    pub(crate) cost: f64,
    /// The curve of the grid, and the entries on it.
    pub(crate) curve: usize,
    pub(crate) entries: usize,
}

/// The settings of a head that no smaller one equals: sizes grow, costs fall.
#[derive(Clone, Debug)]
pub(crate) struct Frontier {
    candidates: Vec<Candidate>,
    /// The indices of its lower convex hull: what is least of `C + λ·size` for some λ.
    hull: Vec<usize>,
}

impl Frontier {
    /// At least one candidate.
    pub(crate) fn new(mut candidates: Vec<Candidate>) -> Self {
        candidates.sort_by(|a, b| {
            let number = |c: &Candidate| (c.curve, c.entries);
            a.size.cmp(&b.size).then(a.cost.total_cmp(&b.cost)).then(number(a).cmp(&number(b)))
        });
        let mut least = f64::INFINITY;
        candidates.retain(|candidate| {
            let is_better = candidate.cost < least;
            least = least.min(candidate.cost);
            is_better
        });
        let mut hull: Vec<usize> = Vec::new();
        for at in 0..candidates.len() {
            while let [.., before, last] = hull[..] {
                let gain = |from: usize, to| gain(&candidates[from], &candidates[to]);
                if gain(before, last) > gain(last, at) {
                    break;
                }
                hull.pop();
            }
            hull.push(at);
        }
        Self { candidates, hull }
    }

    /// The smallest size.
    pub(crate) fn least(&self) -> usize {
        self.candidates[0].size
    }
}

/// What the cost falls by for each unit of size more.
#[allow(clippy::cast_precision_loss)]
fn gain(from: &Candidate, to: &Candidate) -> f64 {
    (from.cost - to.cost) / (to.size - from.size) as f64
}

/// The setting of every head, of the least `Σ C + λ·Σ size` for the smallest λ at which the sizes
/// fit into `total`. What is left then goes, step by step, where it lowers the cost most for its
/// size. None if not even the smallest settings fit.
///
/// As λ falls from ∞, each head goes along its hull, one step whenever λ passes the gain of that
/// step: so all steps of all heads in the order of their gains are every λ at once, and where the
/// total is met is found without a search.
pub(crate) fn choose(frontiers: &[&Frontier], total: usize) -> Option<Vec<Candidate>> {
    let least = frontiers.iter().map(|f| f.least()).fold(0, usize::saturating_add);
    let mut rest = total.checked_sub(least)?;
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (head, Frontier { candidates, hull }) in frontiers.iter().enumerate() {
        for step in hull.windows(2) {
            steps.push((gain(&candidates[step[0]], &candidates[step[1]]), head, step[1]));
        }
    }
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut at = vec![0; frontiers.len()];
    for (_, head, to) in steps {
        let candidates = &frontiers[head].candidates;
        let more = candidates[to].size - candidates[at[head]].size;
        let Some(left) = rest.checked_sub(more) else { break };
        (rest, at[head]) = (left, to);
    }
    // the remainder
    loop {
        let mut best: Option<(f64, usize, usize)> = None;
        for (head, Frontier { candidates, .. }) in frontiers.iter().enumerate() {
            let from = &candidates[at[head]];
            let larger = candidates.iter().enumerate().skip(at[head] + 1);
            for (to, candidate) in larger.take_while(|(_, c)| c.size - from.size <= rest) {
                let gain = gain(from, candidate);
                if best.is_none_or(|(largest, ..)| gain > largest) {
                    best = Some((gain, head, to));
                }
            }
        }
        let Some((_, head, to)) = best else { break };
        let candidates = &frontiers[head].candidates;
        rest -= candidates[to].size - candidates[at[head]].size;
        at[head] = to;
    }
    Some(frontiers.iter().zip(at).map(|(frontier, at)| frontier.candidates[at]).collect())
}
