//! The guests' parameters, taken from the kernel command line.

use super::page::PAGE_SIZE;

/// How many pages to write per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// At this pace.
    PerSecond(u64),
    /// As fast as it goes.
    Max,
}

/// What the area holds before the first write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Nothing: only pages that were written exist.
    None,
    /// Data that does not compress, in every page.
    Random,
    /// Records as programs keep them: text that comes again and again, numbers, and some that is random.
    Records,
}

/// Everything that can be asked for with `xferry.<name>=<value>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Size of the area.
    pub mib: u64,
    /// Pace of the writes.
    pub rate: Rate,
    /// First content of the area.
    pub fill: Fill,
    /// Linux only: read the disk and verify it.
    pub disk_read: bool,
    /// Bare only: frequency of the time stamp counter, when it shall not be measured.
    pub tsc_khz: Option<u64>,
    /// Bare only: burn the CPU while there is nothing to do, rather than halt it.
    pub spin: bool,
}

impl Params {
    /// Reads the command line; what is missing or makes no sense keeps its default.
    pub fn parse(command_line: &str) -> Self {
        let mut params = Params {
            mib: 64,
            rate: Rate::PerSecond(1000),
            fill: Fill::None,
            disk_read: false,
            tsc_khz: None,
            spin: false,
        };
        let options = command_line
            .split_ascii_whitespace()
            .filter_map(|word| word.strip_prefix("xferry.")?.split_once('='));
        for (name, value) in options {
            match (name, value) {
                ("mib", _) => params.mib = value.parse().unwrap_or(params.mib),
                ("rate", "max") => params.rate = Rate::Max,
                ("rate", _) => params.rate = value.parse().map_or(params.rate, Rate::PerSecond),
                ("fill", "random") => params.fill = Fill::Random,
                ("fill", "records") => params.fill = Fill::Records,
                ("fill", "none") => params.fill = Fill::None,
                ("disk", "read") => params.disk_read = true,
                ("tsc-khz", _) => params.tsc_khz = value.parse().ok(),
                ("idle", "spin") => params.spin = true,
                _ => {}
            }
        }
        params
    }

    /// Size of the area in pages.
    pub fn pages(&self) -> usize {
        self.mib as usize * ((1 << 20) / PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_knows() {
        let params =
            Params::parse("console=ttyS0 xferry.mib=12 xferry.rate=max xferry.fill=random xferry.disk=read");
        assert_eq!((params.mib, params.pages()), (12, 3072));
        assert_eq!((params.rate, params.fill), (Rate::Max, Fill::Random));
        assert!(params.disk_read && !params.spin);
        let params = Params::parse("xferry.rate=5000 xferry.tsc-khz=2500000 xferry.idle=spin");
        assert_eq!(params.rate, Rate::PerSecond(5000));
        assert_eq!(params.tsc_khz, Some(2_500_000));
        assert!(params.spin);
    }

    #[test]
    fn keeps_defaults_for_the_rest() {
        let default = Params::parse("");
        assert_eq!(Params::parse("xferry.mib=many xferry.rate xferry.rate=-1 rate=7 xferry.what=1"), default);
    }
}
