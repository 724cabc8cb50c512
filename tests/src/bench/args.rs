//! The command line.

use std::path::PathBuf;

use clap::Parser;
use clap::builder::{PossibleValue, PossibleValuesParser};

use super::cases;
use super::guests::Backing;

/// Measures xferry beside QEMU's own migration, TCP and bare AF_XDP: the same guest, the same link, in the same run.
///
/// Ratios count; times of one machine do not compare with another's. A whole run takes about 20 minutes, a quick one about
/// 5. Nothing else should run on the machine.
#[derive(Debug, Parser)]
pub struct Args {
    /// One run of each, and only the cases that have bars
    #[arg(long)]
    pub(super) quick: bool,
    /// Only this case; can be given several times, or several names with commas
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = case_names())]
    pub(super) only: Vec<String>,
    /// Write all figures to this file, after each case anew [default: bench.json in the build directory]
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Draw plots (SVG) into this directory [default: docs/performance after a whole run, else none]
    #[arg(long, value_name = "DIR")]
    pub(super) plots: Option<PathBuf>,
    /// Compare with what was recorded, and fail if a bar that held is kept less than 0.7 times as well; measures the cases that
    /// have such bars
    #[arg(long, conflicts_with = "record")]
    pub(super) check: bool,
    /// Record the bars that hold, for `--check`
    #[arg(long)]
    pub(super) record: bool,
    /// Where bars are recorded [default: docs/performance/recorded.json]
    #[arg(long, value_name = "FILE")]
    pub(super) recorded: Option<PathBuf>,
    /// Runs of each; medians are shown [default: 3, quick: 1]
    #[arg(long)]
    pub(super) runs: Option<u32>,
    /// Cutovers of case `blackout` [default: 100, quick: 20]
    #[arg(long)]
    pub(super) cutovers: Option<u32>,
    /// RAM of the usual guest in MiB
    #[arg(long, default_value_t = 1024)]
    pub(super) memory: u64,
    /// How much of it is filled and written to, in MiB
    #[arg(long, default_value_t = 900)]
    pub(super) fill: u64,
    /// What its RAM lies in
    #[arg(long, value_enum, default_value_t = Backing::Tmpfs)]
    pub(super) backing: Backing,
    /// Pages that it writes per second
    #[arg(long, default_value_t = 5000)]
    pub(super) rate: u64,
    /// MTU of the migration link
    #[arg(long, default_value_t = 9000)]
    pub(super) mtu: u32,
    /// Queues of the migration NIC
    #[arg(long, default_value_t = 1)]
    pub(super) queues: u32,
    /// The xferry program [default: XFERRY_BIN, or target/release/xferry]
    #[arg(long)]
    pub(super) xferry: Option<PathBuf>,
}

fn case_names() -> PossibleValuesParser {
    PossibleValuesParser::new(cases::ALL.iter().map(|case| PossibleValue::new(case.name).help(case.about)))
}

impl Args {
    /// Runs of each.
    pub(super) fn runs(&self) -> u32 {
        self.runs.unwrap_or(if self.quick { 1 } else { 3 }).max(1)
    }

    /// Cutovers of the case `blackout`.
    pub(super) fn cutovers(&self) -> u32 {
        self.cutovers.unwrap_or(if self.quick { 20 } else { 100 }).max(1)
    }

    /// Whether everything is measured that is measured without being asked for by name.
    pub(super) fn whole(&self) -> bool {
        !self.quick && self.only.is_empty() && !self.check
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_chosen_by_name() {
        let parse = |words: &[&str]| Args::try_parse_from([&["bench"], words].concat());
        let args = parse(&["--only", "random,blackout", "--only", "sizes"]).unwrap();
        assert_eq!(args.only, ["random", "blackout", "sizes"]);
        assert!(!args.whole());
        assert!(parse(&["--only", "nothing"]).is_err());
        assert!(parse(&["--check", "--record"]).is_err());
    }

    #[test]
    fn quick_is_less_of_everything() {
        let args = Args::try_parse_from(["bench", "--quick"]).unwrap();
        assert_eq!((args.runs(), args.cutovers()), (1, 20));
        let args = Args::try_parse_from(["bench", "--quick", "--runs", "5"]).unwrap();
        assert_eq!(args.runs(), 5);
    }
}
