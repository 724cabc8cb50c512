//! What tshark records of a NIC, and finds in it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::lab::{Lab, Process, run_tool, wait_for};

const TSHARK: &str = "tshark";
/// How long tshark may take to begin, and to end.
const LIMIT: Duration = Duration::from_secs(30);
/// Memory for frames that are not yet written, MiB.
const BUFFER_MIB: &str = "64";

/// Why nothing can be recorded here; `None` if it can.
pub fn missing() -> Option<String> {
    run_tool(TSHARK, &["--version"])
        .is_err()
        .then(|| format!("there is no program `{TSHARK}`: install the package tshark"))
}

/// A recording under way.
pub struct Capture {
    tshark: Process,
    file: PathBuf,
}

/// A recording. Its file goes with the lab, or with this.
pub struct Recorded {
    file: PathBuf,
}

impl Capture {
    /// Records all frames of a NIC, whole.
    ///
    /// # Errors
    /// If tshark does not begin.
    pub fn start(lab: &Lab, namespace: &str, nic: &str) -> Result<Self> {
        let path = |kind: &str| lab.layout().run_dir().join(format!("{namespace}-{nic}.{kind}"));
        let (file, log) = (path("pcapng"), path("log"));
        let argv =
            [TSHARK, "-n", "-q", "-i", nic, "-s", "0", "-B", BUFFER_MIB, "-w", &file.display().to_string()];
        let argv = argv.map(str::to_owned);
        let mut tshark = lab.start(&format!("tshark on {nic}"), namespace, &argv, &log)?;
        // It says so when its helper has opened the NIC, and writes the file's header after that.
        wait_for("tshark to begin", LIMIT, || {
            tshark.expect_running()?;
            let begun = file.metadata().is_ok_and(|file| file.len() > 0);
            Ok((begun && tshark.output().contains("Capturing on")).then_some(()))
        })?;
        Ok(Self { tshark, file })
    }

    /// Ends it.
    ///
    /// # Errors
    /// If tshark does not end well.
    pub fn finish(mut self) -> Result<Recorded> {
        self.tshark.signal(Signal::INT)?;
        let status = self.tshark.wait(LIMIT)?;
        ensure!(status.success(), "{}", self.tshark.tail());
        Ok(Recorded { file: self.file })
    }
}

impl Recorded {
    /// The frames that a display filter selects.
    ///
    /// # Errors
    /// If tshark does not take it.
    pub fn count(&self, filter: &str) -> Result<u64> {
        let file = path(&self.file)?;
        let numbers =
            run_tool(TSHARK, &["-n", "-r", file, "-Y", filter, "-T", "fields", "-e", "frame.number"])?;
        Ok(numbers.lines().count() as u64)
    }

    /// The frames in which `bytes` occur.
    ///
    /// # Errors
    /// As [`Self::count`].
    pub fn containing(&self, bytes: &[u8]) -> Result<u64> {
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        self.count(&format!("frame contains {}", hex.join(":")))
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // The lab removes what stays.
        let _ = std::fs::remove_file(&self.file);
    }
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("a file's name that is no text")
}
