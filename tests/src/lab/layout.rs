//! Where a lab keeps its things. All names derive from the lab's prefix, so that two labs never
//! touch each other and what a dead one left can be found.

use std::path::{Path, PathBuf};

use super::plan::Side;

/// Holds run directories and state files of all labs on this machine.
pub(super) const ROOT: &str = "/run/xferry-lab";
/// tmpfs for guest RAM.
const RAM_ROOT: &str = "/dev/shm";

/// Names and paths of one lab.
#[derive(Clone, Debug)]
pub struct Layout {
    prefix: String,
    disk: PathBuf,
}

impl Layout {
    /// The layout for `prefix`; the shared disk image lies in `cache_dir`.
    pub fn new(prefix: &str, cache_dir: &Path) -> Self {
        let disk = cache_dir.join(format!("{prefix}disk.raw"));
        Self { prefix: prefix.to_owned(), disk }
    }

    /// The layout of a lab whose state file says where its disk was.
    pub(super) fn of_state(prefix: &str, disk: &Path) -> Self {
        Self { prefix: prefix.to_owned(), disk: disk.to_owned() }
    }

    /// What every namespace's name starts with; empty for the demo.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The namespace of a host.
    pub fn namespace(&self, side: Side) -> String {
        format!("{}{side}", self.prefix)
    }

    /// The namespace of the switch.
    pub fn switch(&self) -> String {
        format!("{}switch", self.prefix)
    }

    /// The namespace of the client.
    pub fn client(&self) -> String {
        format!("{}client", self.prefix)
    }

    /// The namespace of the third host on the migration network.
    pub fn intruder(&self) -> String {
        format!("{}intruder", self.prefix)
    }

    /// All namespaces that the lab can have. Only some have an intruder.
    pub fn namespaces(&self) -> [String; 5] {
        [self.namespace(Side::A), self.namespace(Side::B), self.switch(), self.client(), self.intruder()]
    }

    /// The lab's directory for sockets, configuration and logs.
    pub fn run_dir(&self) -> PathBuf {
        Path::new(ROOT).join(self.dir_name())
    }

    /// The part of [`Self::run_dir`] that belongs to one host.
    pub fn host_dir(&self, side: Side) -> PathBuf {
        self.run_dir().join(side.name())
    }

    /// Where the agent of one host keeps its journal and reports.
    pub fn state_dir(&self, side: Side) -> PathBuf {
        self.host_dir(side).join("state")
    }

    /// The lab's directory for guest RAM, on tmpfs.
    pub fn ram_dir(&self) -> PathBuf {
        Path::new(RAM_ROOT).join(format!("xferry-lab-{}", self.dir_name()))
    }

    /// The file that is the VM's RAM on one host.
    pub fn ram_file(&self, side: Side) -> PathBuf {
        self.ram_dir().join(side.name()).join("ram")
    }

    /// Where huge pages are mounted, in a lab that has any.
    pub fn huge_dir(&self) -> PathBuf {
        self.run_dir().join("huge")
    }

    /// The raw image that both hosts reach, on a disk filesystem (tmpfs has no `O_DIRECT`).
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    /// Says who owns the lab.
    pub fn state_file(&self) -> PathBuf {
        Path::new(ROOT).join(format!("{}lab.json", self.prefix))
    }

    /// Prefixes end with a dash, which looks odd at the end of a directory's name.
    fn dir_name(&self) -> &str {
        match self.prefix.trim_end_matches('-') {
            "" => "demo",
            name => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demo_has_plain_names() {
        let layout = Layout::new("", Path::new("/cache"));
        assert_eq!(layout.namespaces(), ["host-a", "host-b", "switch", "client", "intruder"]);
        assert_eq!(layout.state_file(), Path::new("/run/xferry-lab/lab.json"));
        assert_eq!(layout.host_dir(Side::B), Path::new("/run/xferry-lab/demo/host-b"));
    }

    #[test]
    fn prefix_is_part_of_everything() {
        let layout = Layout::new("x7-", Path::new("/cache"));
        assert_eq!(layout.namespace(Side::A), "x7-host-a");
        assert_eq!(layout.ram_file(Side::A), Path::new("/dev/shm/xferry-lab-x7/host-a/ram"));
        assert_eq!(layout.disk(), Path::new("/cache/x7-disk.raw"));
    }
}
