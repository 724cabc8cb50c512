//! A cgroup for one thread, with a limit of CPU time (Documentation/admin-guide/cgroup-v2.rst, `cpu.max` and "Threads"; for
//! version 1 Documentation/scheduler/sched-bwc.rst).

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use super::ThrottleError;
use crate::files::{self, MAX_PROC};

/// Shortest quota, µs: the kernel takes none below 1 ms (`min_cfs_quota_period`, kernel/sched/core.c).
const SHORTEST_QUOTA: u64 = 1000;
/// Period of a limit, µs, as long as the quota allows it. A vCPU rests for up to a period at a time, so the guest's clock ticks
/// and its answers to others suffer least from a short one.
const PERIOD: u64 = 10_000;
/// Attempts to remove a group that is in use, and the rest between them.
const REMOVALS: u32 = 20;
const REST: Duration = Duration::from_millis(2);
/// Name of a thread's group, before the thread's number.
const PREFIX: &str = "xferry-throttle-";

/// The kernel's interface that a group has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// Where cgroups with the CPU controller are mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hierarchy {
    version: Version,
    root: PathBuf,
}

/// A thread's cgroup of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    version: Version,
    thread: u32,
    parent: PathBuf,
}

impl Hierarchy {
    /// The one that can limit all of `threads`.
    pub fn of(pid: u32, threads: &[u32]) -> Result<Self, ThrottleError> {
        let found = mounted();
        let mut problems = Vec::new();
        for hierarchy in &found {
            match threads.iter().try_for_each(|&thread| hierarchy.serves(pid, thread)) {
                Ok(()) => return Ok(hierarchy.clone()),
                Err(problem) => problems.push(problem),
            }
        }
        Err(ThrottleError::NoController(match problems.is_empty() {
            true => "no cgroup file system with the cpu controller is mounted where the agent runs (`ip netns exec` hides them: mount \
                     one on /sys/fs/cgroup there)"
                .into(),
            false => problems.join("; "),
        }))
    }

    /// Whether a thread's group can have children with a limit.
    fn serves(&self, pid: u32, thread: u32) -> Result<(), String> {
        let own = self.own(pid, thread).map_err(|error| error.to_string())?;
        if self.version == Version::V1 {
            return own.is_dir().then_some(()).ok_or_else(|| format!("{} is not there", own.display()));
        }
        let controllers = own.join("cgroup.controllers");
        let available = files::read_lossy(&controllers, MAX_PROC)
            .map_err(|error| format!("{}: {error}", controllers.display()))?;
        if available.split_whitespace().any(|name| name == "cpu") {
            return Ok(());
        }
        Err(format!(
            "{} has no cpu controller (where systemd started it, `Delegate=cpu` in its unit gives it one)",
            own.display()
        ))
    }

    /// The group that a thread is in.
    fn own(&self, pid: u32, thread: u32) -> io::Result<PathBuf> {
        let memberships = files::read_lossy(format!("/proc/{pid}/task/{thread}/cgroup"), MAX_PROC)?;
        let path = membership(&memberships, self.version).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("thread {thread} is in no such cgroup"))
        })?;
        Ok(self.root.join(path.trim_start_matches('/')))
    }

    /// A group for a thread, below the one that it is in. Nothing is made yet.
    pub fn group(&self, pid: u32, thread: u32) -> Result<Group, ThrottleError> {
        let parent = self.own(pid, thread).map_err(|source| ThrottleError::Cgroup {
            step: "looking up the cgroup of",
            path: format!("/proc/{pid}/task/{thread}"),
            source,
        })?;
        Ok(Group { version: self.version, thread, parent })
    }
}

/// The groups of `threads` that somebody left behind.
pub(super) fn leftovers(pid: u32, threads: &[u32]) -> Vec<Group> {
    let hierarchies = mounted();
    let pairs =
        hierarchies.iter().flat_map(|hierarchy| threads.iter().map(move |&thread| (hierarchy, thread)));
    pairs
        .filter_map(|(hierarchy, thread)| Group::at(hierarchy.version, &hierarchy.own(pid, thread).ok()?))
        .collect()
}

/// What is mounted here.
fn mounted() -> Vec<Hierarchy> {
    hierarchies(&files::read_lossy("/proc/self/mounts", MAX_PROC).unwrap_or_default())
}

/// Hierarchies that may have the CPU controller, the preferred first: a controller is in one of them alone, which for version 2
/// shows in the groups.
fn hierarchies(mounts: &str) -> Vec<Hierarchy> {
    let all = |version| {
        mounts.lines().filter_map(move |line| {
            let mut fields = line.split(' ').skip(1);
            let (root, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
            let fits = match version {
                Version::V2 => kind == "cgroup2",
                Version::V1 => kind == "cgroup" && options.split(',').any(|option| option == "cpu"),
            };
            fits.then(|| Hierarchy { version, root: root.into() })
        })
    };
    all(Version::V2).chain(all(Version::V1)).collect()
}

/// A thread's cgroup according to its `/proc/PID/task/TID/cgroup` (cgroups(7)).
fn membership(memberships: &str, version: Version) -> Option<&str> {
    memberships.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let fits = match version {
            Version::V2 => number == "0" && controllers.is_empty(),
            Version::V1 => controllers.split(',').any(|name| name == "cpu"),
        };
        fits.then_some(path)
    })
}

/// Quota and period of a limit that takes `percent` (0 to 99) of the time, µs; `None` is no limit.
fn quota(percent: u8) -> Option<(u64, u64)> {
    let left = 100 - u64::from(percent.min(99));
    // A period of its own for shares that leave less than the shortest quota of the usual one.
    let period = PERIOD.max((SHORTEST_QUOTA * 100).div_ceil(left));
    (percent > 0).then_some(((period * left / 100).max(SHORTEST_QUOTA), period))
}

impl Group {
    /// The group whose directory this is, when it is one of ours.
    fn at(version: Version, directory: &Path) -> Option<Self> {
        let thread = directory.file_name()?.to_str()?.strip_prefix(PREFIX)?.parse().ok()?;
        Some(Self { version, thread, parent: directory.parent()?.into() })
    }

    /// As one word, for [`from_word`](Self::from_word).
    pub fn word(&self) -> String {
        let version = if self.version == Version::V2 { "v2" } else { "v1" };
        format!("{version}:{}", self.directory().display())
    }

    /// What [`word`](Self::word) gave.
    pub fn from_word(word: &str) -> Option<Self> {
        let (version, directory) = word.split_once(':')?;
        let version = match version {
            "v1" => Version::V1,
            "v2" => Version::V2,
            _ => return None,
        };
        Self::at(version, Path::new(directory))
    }

    fn directory(&self) -> PathBuf {
        self.parent.join(format!("{PREFIX}{}", self.thread))
    }

    /// By what it limits.
    pub fn mechanism(&self) -> &'static str {
        match self.version {
            Version::V1 => "cpu.cfs_quota_us of cgroup v1",
            Version::V2 => "cpu.max of cgroup v2",
        }
    }

    /// The file that lists threads, in this group and in its parent.
    const fn threads(&self) -> &'static str {
        match self.version {
            Version::V1 => "tasks",
            Version::V2 => "cgroup.threads",
        }
    }

    /// Makes it and puts its thread into it.
    pub fn enter(&self) -> Result<(), ThrottleError> {
        let directory = self.directory();
        if self.version == Version::V2 {
            // Allowed beside processes, because the controller is a threaded one. It is left on: others may use it by then.
            write(&self.parent.join("cgroup.subtree_control"), "+cpu")?;
        }
        match fs::create_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(|source| failed("making the cgroup", &directory, source))?,
        }
        if self.version == Version::V2 {
            write(&directory.join("cgroup.type"), "threaded")?;
        }
        write(&directory.join(self.threads()), &self.thread.to_string())
    }

    /// Takes `percent` of the time, 0 to 99.
    pub fn limit(&self, percent: u8) -> Result<(), ThrottleError> {
        let directory = self.directory();
        match (self.version, quota(percent)) {
            (Version::V2, None) => write(&directory.join("cpu.max"), "max"),
            (Version::V2, Some((quota, period))) => {
                write(&directory.join("cpu.max"), &format!("{quota} {period}"))
            }
            (Version::V1, None) => write(&directory.join("cpu.cfs_quota_us"), "-1"),
            (Version::V1, Some((quota, period))) => {
                // One file after the other: never a moment with a smaller share than wanted, which could be none at all.
                write(&directory.join("cpu.cfs_quota_us"), "-1")?;
                write(&directory.join("cpu.cfs_period_us"), &period.to_string())?;
                write(&directory.join("cpu.cfs_quota_us"), &quota.to_string())
            }
        }
    }

    /// Lifts the limit and takes the group away. Does nothing where there is none.
    pub fn remove(&self) -> Result<(), ThrottleError> {
        let directory = self.directory();
        if !directory.exists() {
            return Ok(());
        }
        // Freed at once, before the thread is moved. It need not have a limit yet.
        let lifted = self.limit(0);
        for _ in 0..REMOVALS {
            self.empty();
            match fs::remove_dir(&directory) {
                // Threads that one of its threads just began, or that have not quite ended.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => std::thread::sleep(REST),
                // Somebody else did it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(source) => return lifted.and(Err(failed("removing the cgroup", &directory, source))),
                Ok(()) => return Ok(()),
            }
        }
        lifted.and(Err(failed("removing the cgroup", &directory, io::ErrorKind::ResourceBusy.into())))
    }

    /// Puts all its threads back to where they were.
    fn empty(&self) {
        let directory = self.directory();
        let members = files::read_lossy(directory.join(self.threads()), MAX_PROC).unwrap_or_default();
        for thread in members.split_whitespace() {
            // One that has just ended is in no cgroup.
            let _ = write(&self.parent.join(self.threads()), thread);
        }
    }
}

fn write(path: &Path, text: &str) -> Result<(), ThrottleError> {
    // Opened, not made: a file that is not there is an interface that the kernel does not have.
    let written = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()));
    written.map_err(|source| failed("writing", path, source))
}

fn failed(step: &'static str, path: &Path, source: io::Error) -> ThrottleError {
    ThrottleError::Cgroup { step, path: path.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
        cgroup /sys/fs/cgroup/cpuset cgroup rw,relatime,cpuset 0 0\n\
        cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0\n\
        cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
    const MEMBERSHIPS: &str = "4:cpuset:/other\n3:cpuacct,cpu:/vms/demo\n0::/system.slice/vm:a.service\n";

    #[test]
    fn both_versions_are_found_in_their_order() {
        let found = hierarchies(MOUNTS);
        assert_eq!(
            found,
            [
                Hierarchy { version: Version::V2, root: "/sys/fs/cgroup/unified".into() },
                Hierarchy { version: Version::V1, root: "/sys/fs/cgroup/cpu,cpuacct".into() },
            ]
        );
        assert_eq!(membership(MEMBERSHIPS, Version::V2), Some("/system.slice/vm:a.service"));
        assert_eq!(membership(MEMBERSHIPS, Version::V1), Some("/vms/demo"));
        assert_eq!(membership("4:cpuset:/other\n", Version::V1), None);
    }

    #[test]
    fn limits_leave_what_was_asked_for_and_the_kernel_takes() {
        assert_eq!(quota(0), None);
        assert_eq!(quota(20), Some((8000, 10_000)));
        assert_eq!(quota(90), Some((1000, 10_000)));
        assert_eq!(quota(99), Some((1000, 100_000)));
        for percent in 1..=100 {
            let (quota, period) = quota(percent).unwrap();
            let left = f64::from(100 - percent.min(99)) / 100.0;
            assert!((quota as f64 / period as f64 - left).abs() < 0.01, "{percent}: {quota} {period}");
            // At most 1 s, by the kernel.
            assert!(quota >= 1000 && period <= 1_000_000);
        }
    }

    /// A directory with the files that the kernel would make.
    fn tree(version: Version) -> (tempfile::TempDir, Group) {
        let dir = tempfile::tempdir().unwrap();
        let group = Group { version, thread: 42, parent: dir.path().into() };
        fs::create_dir(group.directory()).unwrap();
        for file in ["cgroup.threads", "tasks", "cgroup.subtree_control"] {
            fs::write(group.parent.join(file), "").unwrap();
        }
        for file in
            ["cgroup.threads", "tasks", "cgroup.type", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"]
        {
            fs::write(group.directory().join(file), "").unwrap();
        }
        (dir, group)
    }

    #[test]
    fn a_thread_gets_a_limit_of_its_own_and_loses_it() {
        for (version, file, limited, lifted) in [
            (Version::V2, "cpu.max", "1000 10000", "max"),
            // Files keep what was longer, unlike the kernel's.
            (Version::V1, "cpu.cfs_quota_us", "1000", "-100"),
        ] {
            let (_dir, group) = tree(version);
            group.enter().unwrap();
            group.limit(90).unwrap();
            let read = |path: PathBuf| fs::read_to_string(path).unwrap();
            assert_eq!(read(group.directory().join(file)), limited);
            assert_eq!(read(group.directory().join(group.threads())), "42");
            // A directory with files does not go away, unlike a cgroup.
            assert!(group.remove().is_err());
            assert!(read(group.directory().join(file)).starts_with(lifted));
            assert_eq!(read(group.parent.join(group.threads())), "42", "the thread is back where it was");
            fs::remove_dir_all(group.directory()).unwrap();
            group.remove().unwrap();
        }
    }

    #[test]
    fn groups_are_known_by_their_names() {
        let group = Group { version: Version::V2, thread: 42, parent: "/sys/fs/cgroup/a:b c".into() };
        assert_eq!(Group::from_word(&group.word()), Some(group));
        assert_eq!(Group::from_word("v2:/sys/fs/cgroup/a"), None);
        assert_eq!(Group::at(Version::V1, Path::new("/sys/fs/cgroup/xferry-throttle-x")), None);
    }
}
