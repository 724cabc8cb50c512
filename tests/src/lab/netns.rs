//! Network namespaces by name, as `ip netns` keeps them: make, enter, empty, remove.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::command::run;

/// How long killed processes may take to be gone. Freeing a large guest's RAM takes its time.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Where `ip netns` mounts a namespace.
fn path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// Whether a namespace of that name exists.
pub fn exists(name: &str) -> bool {
    path(name).exists()
}

/// Makes a namespace.
pub(super) fn add(name: &str) -> Result<()> {
    run("ip", &["netns", "add", name]).map(drop)
}

/// Removes a namespace's name; the kernel removes what is in it once nobody uses it.
pub(super) fn delete(name: &str) -> Result<()> {
    run("ip", &["netns", "delete", name]).map(drop)
}

/// Moves the calling thread, and only it, into the namespace. Sockets that it makes from now on
/// belong there and stay there.
///
/// # Errors
/// If there is no such namespace or we are not root.
pub fn enter(name: &str) -> Result<()> {
    let file =
        File::open(path(name)).with_context(|| format!("no network namespace {name}: is the lab up?"))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("cannot enter network namespace {name} (root is needed)"))
}

/// Runs `work` on a thread of its own inside the namespace and returns its result.
///
/// # Errors
/// Those of [`enter`] and of `work`; also if `work` panicked.
pub fn inside<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            enter(name)?;
            work()
        });
        worker.join().unwrap_or_else(|_| Err(anyhow!("a thread in namespace {name} panicked")))
    })
}

/// The processes whose main thread is in the namespace, ourselves excepted.
///
/// # Errors
/// If `/proc` or the namespace cannot be read.
pub fn pids(name: &str) -> Result<Vec<i32>> {
    let namespace = identity(&path(name)).with_context(|| format!("no network namespace {name}"))?;
    let own = i32::try_from(std::process::id()).context("our process id")?;
    let entries = fs::read_dir("/proc").context("reading /proc")?;
    let members = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|&pid| pid != own && is_member(pid, namespace))
        .collect();
    Ok(members)
}

/// Kills every process in the namespace and waits until all are gone.
///
/// # Errors
/// If some do not go within [`KILL_LIMIT`].
pub(super) fn kill_all(name: &str) -> Result<()> {
    let namespace = identity(&path(name)).with_context(|| format!("no network namespace {name}"))?;
    let deadline = Instant::now() + KILL_LIMIT;
    loop {
        // Again and again: a process may have forked between listing and killing.
        let members = pids(name)?;
        if members.is_empty() {
            return Ok(());
        }
        for &pid in &members {
            kill_member(pid, namespace);
        }
        if Instant::now() > deadline {
            bail!(
                "processes {members:?} in namespace {name} do not die; look at them with `ps`, then run this again"
            );
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Device and inode of a namespace: what tells two of them apart.
type Identity = (u64, u64);

fn identity(path: &Path) -> std::io::Result<Identity> {
    fs::metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// A zombie has no namespace any more and is no member.
fn is_member(pid: i32, namespace: Identity) -> bool {
    identity(Path::new(&format!("/proc/{pid}/ns/net"))).is_ok_and(|id| id == namespace)
}

/// Kills by pidfd, and looks again after opening it: a number alone may belong to somebody else by now.
fn kill_member(pid: i32, namespace: Identity) {
    let Some(raw) = Pid::from_raw(pid) else { return };
    let Ok(pidfd) = pidfd_open(raw, PidfdFlags::empty()) else { return };
    if is_member(pid, namespace) {
        // It may have ended by itself; the caller looks whether any is left.
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    }
}
