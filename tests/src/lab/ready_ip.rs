//! An `ip` that was started in advance: what it is told takes effect a tenth of a millisecond later, where starting
//! one takes longer than a whole handover.

use std::io::Write;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result};

use super::process::spawn;

/// Waits in a host's namespace for lines to carry out.
#[derive(Debug)]
pub struct ReadyIp {
    child: Child,
    /// Its end ends the process, also when we are killed.
    lines: Option<ChildStdin>,
}

impl ReadyIp {
    pub(super) fn start(namespace: &str) -> Result<Self> {
        let mut command = Command::new("ip");
        // What one line says may be so already; the next one counts all the same.
        command.args(["-n", namespace, "-force", "-batch", "-"]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = spawn(command).with_context(|| format!("cannot start `ip` in {namespace}"))?;
        let lines = child.stdin.take();
        Ok(Self { child, lines })
    }

    /// Carries out a line, as `ip` would its arguments.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let lines = self.lines.as_mut().context("`ip` has no input")?;
        lines.write_all(format!("{line}\n").as_bytes()).with_context(|| format!("telling `ip` to {line}"))
    }
}

impl Drop for ReadyIp {
    fn drop(&mut self) {
        drop(self.lines.take());
        // It carries out what it was told and ends.
        let _ = self.child.wait();
    }
}
