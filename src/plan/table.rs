//! A plan as a table for people.

use crate::plan::options::Budget;
use crate::plan::setting::HeadSetting;
use crate::plan::state_plan::StatePlan;
use core::fmt;

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slots(most) => write!(f, "{most} slots a head"),
            Self::FloatsPerHead(most) => write!(f, "{most} floats a head"),
            Self::BytesPerHead(most) => write!(f, "{most} bytes a head"),
        }
    }
}

/// A table for people: every head, the totals, and the predicted cost by length.
impl fmt::Display for StatePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.cost();
        let share = |cost: f64| if total > 0.0 { 100.0 * cost / total } else { 0.0 };
        writeln!(
            f,
            "{:>5} {:>7} {:>6} {:>7} {:>5} {:>14} {:>7}",
            "layer", "kv head", "window", "entries", "decay", "predicted cost", "share"
        )?;
        for head in &self.heads {
            write!(f, "{:>5} {:>7} ", head.layer, head.kv_head)?;
            match head.setting {
                HeadSetting::Exact => write!(f, "{:>6} {:>7} {:>5}", "exact", "", "")?,
                HeadSetting::Merged { window, entries, decay } => {
                    write!(f, "{window:>6} {entries:>7} {decay:>5}")?;
                }
            }
            writeln!(f, " {:>14.6} {:>6.1}%", head.cost, share(head.cost))?;
        }
        let exact = self.exact_heads().len();
        write!(f, "\n{} heads, {exact} of them exact", self.heads.len())?;
        writeln!(
            f,
            "; the others: {:.1} slots on average, {} sinks; states in {}",
            self.mean_slots(),
            self.sinks,
            self.format.name()
        )?;
        write!(f, "budget: {}", self.budget)?;
        match self.length {
            Some(length) => writeln!(f, ", for {length} tokens")?,
            None => writeln!(f, ", for texts as long as the samples")?,
        }
        let unit = if self.sensitivities {
            "nats a token"
        } else {
            "squared relative output errors, summed over heads"
        };
        writeln!(f, "predicted cost: {total:.6} {unit}")?;
        for (length, cost) in self.cost_by_length() {
            writeln!(f, "{:>9} .. {length:<8} {cost:.6}", length / 2 + 1)?;
        }
        Ok(())
    }
}
