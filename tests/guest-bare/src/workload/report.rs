//! What goes to the serial console. The lab reads it.

use super::line::Line;

/// The first line of a guest that works.
pub const READY_LINE: &str = "xferry-guest ready";
/// How many errors are described; all are counted.
const DESCRIBED_ERRORS: u64 = 20;
const REPORTS_PER_SECOND: u64 = 10;

/// Something that was not as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// A word of a page.
    Page {
        /// Number of the page.
        number: usize,
        /// Which of its words.
        word: usize,
        /// What belongs there.
        want: u64,
        /// What was there.
        got: u64,
    },
    /// The sum over the generation table.
    Table {
        /// What it must be.
        want: u64,
        /// What it was.
        got: u64,
    },
    /// A word read from the disk; all zero when the read itself failed.
    #[allow(dead_code, reason = "only the Linux guest has a disk")]
    Disk {
        /// Where on the disk.
        offset: u64,
        /// What belongs there.
        want: u64,
        /// What was in the buffer.
        got: u64,
    },
}

/// The figures of a report line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Pages written so far.
    pub count: u64,
    /// Pages, table sums, disk blocks that were wrong.
    pub errors: u64,
    /// Sweeps over all pages that were completed.
    pub sweeps: u64,
    /// Disk reads that were verified.
    pub disk: u64,
}

/// The line that is printed ten times a second.
pub fn report_line(counters: &Counters) -> Line {
    let Counters { count, errors, sweeps, disk } = counters;
    Line::new(format_args!("xferry-guest count={count} errors={errors} sweeps={sweeps} disk={disk}"))
}

/// The line that describes an error, unless there were enough of them; `errors` includes this one.
pub fn error_line(mismatch: &Mismatch, errors: u64) -> Option<Line> {
    if errors > DESCRIBED_ERRORS {
        return None;
    }
    Some(match *mismatch {
        Mismatch::Page { number, word, want, got } => Line::new(format_args!(
            "xferry-guest ERROR {number} want={want:#018x} got={got:#018x} word={word}"
        )),
        Mismatch::Disk { offset, want, got } => {
            Line::new(format_args!("xferry-guest ERROR disk:{offset:#x} want={want:#018x} got={got:#018x}"))
        }
        Mismatch::Table { want, got } => {
            Line::new(format_args!("xferry-guest ERROR table want={want} got={got}"))
        }
    })
}

/// Says when the next report is due.
pub struct Reporter {
    interval: u64,
    last: Option<u64>,
}

impl Reporter {
    /// A report is due at once, then ten times a second.
    pub fn new(ticks_per_second: u64) -> Self {
        Reporter { interval: ticks_per_second / REPORTS_PER_SECOND, last: None }
    }

    /// Is it time? Also when the clock went back.
    pub fn is_due(&mut self, now: u64) -> bool {
        let due = self.last.is_none_or(|last| now.wrapping_sub(last) >= self.interval);
        if due {
            self.last = Some(now);
        }
        due
    }
}
