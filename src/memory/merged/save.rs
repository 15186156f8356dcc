//! The numbers of a merging memory, out and back in.

use crate::memory::merged::entries::{METRIC_TOKENS, MergedMemory};
use crate::scalar::Scalar;
use ndarray::ArrayView1;

impl<T: Scalar> MergedMemory<T> {
    /// What has to be kept to go on from here: the entries, then the sums that set the units.
    pub(crate) fn numbers(&self, out: &mut Vec<T>) {
        for entry in 0..self.held {
            out.extend(self.slots.key(entry));
            out.extend(self.slots.value(entry));
            out.extend([T::from_f64(self.counts[entry]), self.weights[entry]]);
        }
        out.push(self.units.squared_values);
        out.extend(&self.units.squared_queries);
    }

    /// How many [`numbers`](Self::numbers) there are, of so many entries.
    pub(crate) fn count_numbers(&self, entries: usize) -> usize {
        entries * (self.slots.head_dim + self.slots.value_dim + 2) + 1 + self.slots.head_dim
    }

    /// The inverse; `seen` tokens have been observed. `false` if the numbers are none of a memory.
    pub(crate) fn set_numbers(
        &mut self,
        entries: usize,
        absorbed: usize,
        seen: usize,
        numbers: &[T],
    ) -> bool {
        self.reset();
        let (d, dv) = (self.slots.head_dim, self.slots.value_dim);
        let (all, units) = numbers.split_at(entries * (d + dv + 2));
        for (slot, entry) in all.chunks_exact(d + dv + 2).enumerate() {
            if slot >= self.most_slots()
                || !(entry[d + dv] >= T::one() && entry[d + dv + 1] > T::zero())
            {
                return false;
            }
            self.make_room();
            self.slots.put(
                slot,
                ArrayView1::from(&entry[..d]),
                ArrayView1::from(&entry[d..d + dv]),
            );
            self.enter(entry[d + dv + 1]);
            self.counts[slot] = entry[d + dv].as_f64();
            self.slots.bias[slot] = T::from_f64(libm::log2(self.counts[slot]));
        }
        self.absorbed = absorbed;
        if units.iter().any(|&sum| sum < T::zero()) {
            return false;
        }
        if let Some((&values, queries)) = units.split_first() {
            self.units.squared_values = values;
            self.units.squared_queries.copy_from_slice(queries);
        }
        let has_units = self.has_query_units() || self.has_value_units();
        self.units.tokens = if has_units { seen.min(METRIC_TOKENS) } else { 0 };
        true
    }

    /// Numbers of the state: d + d_v + 2 of each entry, and the units of the metric.
    pub(crate) fn floats(&self) -> usize {
        let (d, dv) = (self.slots.head_dim, self.slots.value_dim);
        let queries = if self.has_query_units() { d } else { 0 };
        self.rule.entries * (d + dv + 2) + queries + usize::from(self.has_value_units())
    }

    /// The same in bytes: keys and values in their format, all else in numbers of the kernel.
    pub(crate) fn bytes(&self) -> usize {
        let (d, dv) = (self.slots.head_dim, self.slots.value_dim);
        let format = self.slots.format();
        let wide = self.floats() - self.rule.entries * (d + dv);
        let rows = format.row_bytes::<T>(d) + format.row_bytes::<T>(dv);
        self.rule.entries * rows + wide * size_of::<T>()
    }
}
