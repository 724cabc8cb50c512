//! Facts of an interface, read afresh: operators change them while the agent runs.

use std::{net::IpAddr, path::Path};

use serde::{Deserialize, Serialize};

use super::NetworkError;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl std::fmt::Debug for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2);
            *byte = part
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| format!("{text:?} is not an Ethernet address like 52:54:00:12:34:56"))?;
        }
        if parts.next().is_some() {
            return Err(format!("{text:?} is not an Ethernet address: it is too long"));
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// A network interface of this host (of the network namespace the agent runs in).
#[derive(Clone, Debug)]
pub struct Nic {
    /// Name.
    pub name: String,
    /// Index.
    pub index: u32,
    /// Ethernet address.
    pub mac: Mac,
    /// Largest IP packet, bytes.
    pub mtu: usize,
    /// Number of receive queues.
    pub queues: u32,
    /// Addresses with their prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
}

impl Nic {
    /// Reads the facts of `name`.
    ///
    /// # Errors
    /// When there is no such interface, it has no carrier or no IP address.
    pub fn read(name: &str) -> Result<Self, NetworkError> {
        let interface = pnet::datalink::interfaces()
            .into_iter()
            .find(|interface| interface.name == name)
            .ok_or_else(|| NetworkError::NoInterface(name.to_owned()))?;
        let base = Path::new("/sys/class/net").join(name);
        let read = |what: &'static str| {
            std::fs::read_to_string(base.join(what)).map_err(|source| NetworkError::Facts {
                what,
                interface: name.to_owned(),
                source,
            })
        };
        let mtu = read("mtu")?.trim().parse().map_err(|_| NetworkError::Facts {
            what: "mtu",
            interface: name.to_owned(),
            source: std::io::ErrorKind::InvalidData.into(),
        })?;
        // Reading `carrier` of an interface that is down is EINVAL.
        if read("carrier").map_or("0".to_owned(), |text| text.trim().to_owned()) != "1" {
            return Err(NetworkError::NoCarrier(name.to_owned()));
        }
        let queues = std::fs::read_dir(base.join("queues"))
            .map(|entries| {
                entries
                    .flatten()
                    .filter(|entry| entry.file_name().to_string_lossy().starts_with("rx-"))
                    .count()
            })
            .unwrap_or(1)
            .max(1);
        let mac = interface.mac.map(|mac| mac.octets()).unwrap_or_default();
        let addresses: Vec<_> = interface
            .ips
            .iter()
            .map(|network| (network.ip(), network.prefix()))
            // Link-local IPv6 is there without anybody's intention.
            .filter(|(ip, _)| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()))
            .collect();
        if addresses.is_empty() {
            return Err(NetworkError::NoAddress(name.to_owned()));
        }
        Ok(Self {
            name: name.to_owned(),
            index: interface.index,
            mac: Mac(mac),
            mtu,
            queues: queues as u32,
            addresses,
        })
    }

    /// The address to use: IPv4 first.
    pub fn address(&self) -> IpAddr {
        let v4 = self.addresses.iter().find(|(ip, _)| ip.is_ipv4());
        v4.or(self.addresses.first()).map_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), |(ip, _)| *ip)
    }

    /// Whether `ip` is a neighbour on this interface's own network.
    pub fn on_link(&self, ip: IpAddr) -> bool {
        self.addresses.iter().any(|&(own, prefix)| same_network(own, ip, prefix))
    }
}

fn same_network(a: IpAddr, b: IpAddr, prefix: u8) -> bool {
    let (a, b, width) = match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(a.to_bits()), u128::from(b.to_bits()), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits(), 128),
        _ => return false,
    };
    let shift = width - u32::from(prefix).min(width);
    a.checked_shr(shift).unwrap_or(0) == b.checked_shr(shift).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        let mac: Mac = "52:54:00:Ab:cd:ef".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
        for bad in ["", "52:54", "52:54:00:12:34:5", "52:54:00:12:34:56:78", "52:54:00:12:34:zz"] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn networks_are_compared_by_prefix() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(same_network(ip("10.0.0.1"), ip("10.0.0.200"), 24));
        assert!(!same_network(ip("10.0.0.1"), ip("10.0.1.1"), 24));
        assert!(same_network(ip("10.0.0.1"), ip("192.168.0.1"), 0));
        assert!(same_network(ip("fd00::1"), ip("fd00::2"), 64));
        assert!(!same_network(ip("fd00::1"), ip("10.0.0.1"), 0));
    }

    #[test]
    fn a_missing_interface_is_named() {
        let error = Nic::read("no-such-nic").unwrap_err().to_string();
        assert!(error.contains("no-such-nic") && error.contains("ip link"), "{error}");
    }
}
