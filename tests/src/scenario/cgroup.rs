//! CPU limits of a VM's threads: what an agent needs to set them in the lab, and what is left of them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// Name of the cgroups that an agent makes, before the thread's number (`vmm/throttle/cgroup.rs`).
const PREFIX: &str = "xferry-throttle-";

/// The hierarchy with the CPU controller: how `mount` gets at it.
fn hierarchy(mounts: &str) -> Option<Vec<String>> {
    let of = |kind: &'static str| {
        mounts.lines().filter_map(move |line| {
            let mut fields = line.split(' ').skip(2);
            (fields.next() == Some(kind)).then(|| fields.next().unwrap_or_default())
        })
    };
    let controllers = |options: &str| {
        let named: Vec<&str> = options.split(',').filter(|name| ["cpu", "cpuacct"].contains(name)).collect();
        named.contains(&"cpu").then(|| named.join(","))
    };
    if let Some(controllers) = of("cgroup").find_map(controllers) {
        return Some(vec!["-t".into(), "cgroup".into(), "-o".into(), controllers]);
    }
    of("cgroup2").next().map(|_| vec!["-t".into(), "cgroup2".into()])
}

/// A command that becomes another, with the cgroups that `ip netns exec` hides behind a /sys of its own. `None` where this
/// machine cannot limit CPU time.
pub fn with_cgroups() -> Option<Vec<String>> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mount = hierarchy(&mounts)?.join(" ");
    let script = format!("mount {mount} cgroup /sys/fs/cgroup && exec \"$@\"");
    Some(["sh", "-c", &script, "sh"].map(str::to_owned).to_vec())
}

/// Threads of a process that are in a cgroup for throttling.
///
/// # Errors
/// If the process is gone.
pub fn throttled(pid: i32) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))? {
        let path: PathBuf = task?.path().join("cgroup");
        // A thread may just have ended.
        let memberships = fs::read_to_string(path).unwrap_or_default();
        found.extend(memberships.lines().filter(|line| line.contains(PREFIX)).map(ToOwned::to_owned));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::hierarchy;

    #[test]
    fn the_hierarchy_with_the_cpu_controller_is_found() {
        let v1 = "cgroup /c/memory cgroup rw,memory 0 0\ncgroup /c/cpu cgroup rw,relatime,cpu,cpuacct 0 0\n\
                  cgroup2 /c/unified cgroup2 rw 0 0";
        assert_eq!(hierarchy(v1).unwrap().join(" "), "-t cgroup -o cpu,cpuacct");
        assert_eq!(hierarchy("cgroup2 /c cgroup2 rw 0 0").unwrap().join(" "), "-t cgroup2");
        assert_eq!(hierarchy("tmpfs /tmp tmpfs rw 0 0"), None);
    }
}
