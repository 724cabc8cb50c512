//! The process that lifts a throttle when the agent dies.
//!
//! Its standard input is a pipe whose other end only the agent has: however the agent ends, the kernel closes that, and the guard
//! lifts the limits and ends too.

use std::{
    io::{self, Read},
    process::{Child, Command, ExitCode, Stdio},
};

use super::{ThrottleError, cgroup::Group};

/// First argument of the guard program; the others are groups.
pub const GUARD_ARGUMENT: &str = "__lift-throttle";
/// Our own program, also when its file was replaced since we started.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// A guard process. Ends when dropped.
#[derive(Debug)]
pub(super) struct Guard(Option<Child>);

impl Guard {
    /// Starts one for `groups`.
    pub fn start(groups: &[Group]) -> Result<Self, ThrottleError> {
        use std::os::unix::process::CommandExt;
        Command::new(OWN_PROGRAM)
            .arg(GUARD_ARGUMENT)
            .args(groups.iter().map(Group::word))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // Signals to the agent's group are not meant for it.
            .process_group(0)
            .spawn()
            .map(|child| Self(Some(child)))
            .map_err(ThrottleError::Guard)
    }

    /// Starts another when this one was killed.
    pub fn keep(&mut self, groups: &[Group]) -> Result<(), ThrottleError> {
        let ended = self.0.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)));
        if ended {
            *self = Self::start(groups)?;
        }
        Ok(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // It sees the end of its input, finds nothing to do or does it, and ends. Nobody waits for that.
        let Some(mut child) = self.0.take() else { return };
        drop(child.stdin.take());
        std::thread::spawn(move || child.wait());
    }
}

/// A guard's whole life; `words` are its arguments.
pub fn guard(words: impl Iterator<Item = String>) -> ExitCode {
    let groups: Vec<Group> = words.filter_map(|word| Group::from_word(&word)).collect();
    // Nothing is ever written to it: this returns when the agent is gone or needs no guard any more.
    let _ = io::stdin().read_to_end(&mut Vec::new());
    let mut code = ExitCode::SUCCESS;
    for group in &groups {
        if let Err(error) = group.remove() {
            eprintln!("xferry: {error}");
            code = ExitCode::FAILURE;
        }
    }
    code
}
