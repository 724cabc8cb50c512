//! What a guest can be asked to do.

use std::fmt::{self, Display};

/// How many pages the guest writes per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// At this pace; 0 is a guest that only verifies and reports.
    PerSecond(u64),
    /// As fast as it goes.
    Max,
}

/// What the guest's area holds before the first write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Nothing: pages come into being as they are written.
    None,
    /// Data that does not compress, in every page.
    Random,
    /// Records of text, numbers and random data, in every page: about three times smaller when compressed.
    Records,
}

/// What the guest shall do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestParams {
    /// Size of the area that it writes and verifies, in MiB. The guest takes less when it has less.
    pub mib: u64,
    /// Pace of the writes.
    pub rate: Rate,
    /// First content of the area.
    pub fill: Fill,
    /// Address and prefix length (`192.0.2.7/24`) of its network device. Linux only.
    pub ip: Option<String>,
    /// Read the disk with `O_DIRECT` as hard as possible and verify it; it must have been written by
    /// [`write_disk_pattern`](super::write_disk_pattern). Linux only.
    pub disk_read: bool,
}

impl Display for GuestParams {
    /// As words of a kernel command line.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "xferry.mib={}", self.mib)?;
        match self.rate {
            Rate::PerSecond(pages) => write!(f, " xferry.rate={pages}")?,
            Rate::Max => write!(f, " xferry.rate=max")?,
        }
        match self.fill {
            Fill::None => write!(f, " xferry.fill=none")?,
            Fill::Random => write!(f, " xferry.fill=random")?,
            Fill::Records => write!(f, " xferry.fill=records")?,
        }
        if let Some(ip) = &self.ip {
            write!(f, " xferry.ip={ip}")?;
        }
        if self.disk_read {
            write!(f, " xferry.disk=read")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_command_line() {
        let mut params =
            GuestParams { mib: 64, rate: Rate::PerSecond(0), fill: Fill::None, ip: None, disk_read: false };
        assert_eq!(params.to_string(), "xferry.mib=64 xferry.rate=0 xferry.fill=none");
        params.rate = Rate::Max;
        params.fill = Fill::Random;
        params.ip = Some("192.0.2.7/24".into());
        params.disk_read = true;
        assert_eq!(
            params.to_string(),
            "xferry.mib=64 xferry.rate=max xferry.fill=random xferry.ip=192.0.2.7/24 xferry.disk=read"
        );
    }
}
