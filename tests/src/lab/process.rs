//! Processes inside the lab's namespaces. They end with us, in whatever way we end.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::process::{Pid, Signal, kill_process};

use super::sync::lock;
use super::wait::wait_for;

/// How many lines of a log an error shows.
const TAIL_LINES: usize = 15;

/// Whether a process ends with the lab's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// The kernel kills it when we die, even by `kill -9`; the guard kills it on drop.
    WithUs,
    /// It stays for whoever looks at a kept lab. Teardown still finds it by its namespace.
    Kept,
}

/// A running process and where its output goes.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    lifetime: Lifetime,
}

impl Process {
    /// Starts `argv` in `namespace`; what it prints is appended to `log`.
    pub(super) fn start(
        name: &str,
        namespace: &str,
        argv: &[String],
        log: &Path,
        lifetime: Lifetime,
    ) -> Result<Self> {
        let output = append(log)?;
        let errors = output.try_clone().context("duplicating a log's descriptor")?;
        let mut command = in_namespace(namespace, argv, lifetime);
        // Into a file, so without colours.
        command.stdin(Stdio::null()).stdout(output).stderr(errors).env("NO_COLOR", "1");
        if lifetime == Lifetime::WithUs {
            // Ctrl-C in the terminal is for us: we end the others, in order.
            command.process_group(0);
        }
        let child =
            spawn(command).with_context(|| format!("cannot start {name} in namespace {namespace}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned(), lifetime })
    }

    /// Its process id (`ip netns exec` and `setpriv` become the program, so it is the program's).
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it did.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("asking for the state of {}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it still runs after `limit`; it then goes on.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        wait_for(&what, limit, || self.try_wait())
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends it a signal, as an operator would with `kill`.
    ///
    /// # Errors
    /// If it has ended and was waited for.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // Its number stays its own until it is waited for.
        kill_process(Pid::from_child(&self.child), signal)
            .with_context(|| format!("sending a signal to {}", self.name))
    }

    /// Everything it printed so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The last lines it printed, for an error.
    pub fn tail(&self) -> String {
        tail(&self.name, &self.log)
    }

    /// An error if it has ended, with what it said last.
    ///
    /// # Errors
    /// That it has ended.
    pub fn expect_running(&mut self) -> Result<()> {
        match self.try_wait()? {
            None => Ok(()),
            Some(status) => Err(anyhow!("{} ended early ({status})\n{}", self.name, self.tail())),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.lifetime == Lifetime::WithUs {
            self.kill();
        }
    }
}

/// The end of a log file under a heading, for an error.
pub fn tail(name: &str, log: &Path) -> String {
    last_lines(name, log, TAIL_LINES)
}

/// The last `count` lines of a log file under a heading.
pub fn last_lines(name: &str, log: &Path, count: usize) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(count)..];
    if last.is_empty() {
        return format!("{name} said nothing in {}", log.display());
    }
    format!("the end of {}:\n  {}", log.display(), last.join("\n  "))
}

/// Opens a log to append to it.
pub(super) fn append(log: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(log);
    file.with_context(|| format!("opening {}", log.display()))
}

/// `argv` as it is run in a namespace.
pub(super) fn in_namespace(namespace: &str, argv: &[String], lifetime: Lifetime) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace]);
    match lifetime {
        Lifetime::WithUs => command.args(["setpriv", "--pdeathsig", "KILL", "--"]),
        // Away from our terminal, which sends SIGHUP when it closes.
        Lifetime::Kept => command.arg("setsid"),
    };
    command.args(argv);
    command
}

/// Starts a command from a thread that lives as long as this process: the kernel sends the parent
/// death signal when the *thread* that started a child ends, and test threads end early.
pub(super) fn spawn(command: Command) -> io::Result<Child> {
    type Job = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, reply) in queue {
                // If nobody waits for the reply any more, the child is dropped and goes on alone until
                // its lab is removed.
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(jobs)
    });
    let (reply, answer) = mpsc::channel();
    let gone = || io::Error::other("the thread that starts processes is gone");
    lock(spawner).send((command, reply)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_shows_the_last_lines() {
        let path = std::env::temp_dir().join(format!("xferry-lab-tail-{}", std::process::id()));
        let text: String = (0..40).map(|n| format!("line {n}\n")).collect();
        fs::write(&path, text).unwrap();
        let shown = tail("a program", &path);
        fs::remove_file(&path).unwrap();
        assert!(
            shown.ends_with("line 39") && shown.contains("line 25\n") && !shown.contains("line 24\n"),
            "{shown}"
        );
    }

    #[test]
    fn tail_of_no_file_says_so() {
        assert!(tail("a program", Path::new("/nonexistent")).starts_with("a program said nothing"));
    }
}
