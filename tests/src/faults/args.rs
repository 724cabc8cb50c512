//! The campaign's command line.

use std::path::PathBuf;

use clap::Parser;

/// Migrates a VM again and again between two hosts made of network namespaces, disturbs every migration by one fault,
/// and counts what became of the VM.
///
/// Needs root and /dev/kvm. Everything is removed at the end. Succeeds only if nothing happened that must not.
#[derive(Clone, Debug, Parser)]
#[command(name = "faults", version)]
pub struct Args {
    /// How many runs
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub runs: u64,

    /// What all choices follow from [default: the time]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,

    /// Write counts, table and failures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Write the table in Markdown to this file
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,

    /// Only print what each run would do
    #[arg(long)]
    pub plan: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_sound() {
        Args::command().debug_assert();
        assert!(Args::try_parse_from(["faults", "--runs", "0"]).is_err());
    }
}
