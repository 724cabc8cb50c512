//! One function for each parser of what comes from outside: takes any bytes, and panics when a promise is broken.
//!
//! The fuzzer (`fuzz/`, `cargo xtask fuzz`) calls them with inputs of its own; the tests below call them with the
//! corpora in the repository. Compiled for these two only.

mod frame;
#[cfg(test)]
pub(crate) mod seeds;

use bytes::BytesMut;
use migrate_common::locate::{self, Claim, Datagram};

use crate::{
    agent::AgentConfig,
    control::{Item, MAX_MESSAGE, Message, decode},
    datapath::{Encryption, Feedback},
    memory::RamLayout,
    preflight::{self, Admission, Backing, DestinationFacts, HostFacts},
    vmm::VmDefinition,
};

pub use frame::frame;

/// UDP port of the page stream in all inputs.
const PORT: u16 = 4791;

/// Fewer cases of a property test than usual, where each takes long; and no more than `PROPTEST_CASES` says.
#[cfg(test)]
pub(crate) fn at_most(cases: u32) -> proptest::test_runner::Config {
    let usual = proptest::test_runner::Config::default();
    proptest::test_runner::Config { cases: cases.min(usual.cases), ..usual }
}

/// A feedback datagram: what is understood is written the same way.
pub fn feedback(data: &[u8]) {
    if let Some(feedback) = Feedback::parse(data) {
        assert_eq!(feedback.to_bytes().as_slice(), data);
    }
}

/// A stream of control items or, after a first byte that is even, one message's text; and what a destination does
/// with the facts of a `prepare`.
pub fn control(data: &[u8]) {
    let Some((mode, body)) = data.split_first() else { return };
    let mut buffer = BytesMut::new();
    if mode % 2 == 0 {
        buffer.extend_from_slice(&(body.len() as u32 + 1).to_be_bytes());
        buffer.extend_from_slice(&[1]);
    }
    buffer.extend_from_slice(body);
    while let Ok(Some(item)) = decode(&mut buffer, MAX_MESSAGE) {
        let Item::Message(message) = item else { continue };
        heard(&message);
    }
}

/// What is done with a message before anything is asked of the host.
fn heard(message: &Message) {
    assert!(!message.name().is_empty());
    match message {
        Message::Prepare(request) => {
            let layout = RamLayout::new(request.facts.machine.backends.clone());
            let needed = preflight::needed(&request.populated, layout.backends());
            assert!(needed.iter().sum::<u64>() <= layout.bytes(), "more is needed than there is");
            let (host, admission) = (HostFacts::default(), Admission::default());
            // This host's own facts are as they are; only what is looked up by the source's is its.
            let mut machine = request.facts.machine.clone();
            machine.disks.truncate(4);
            preflight::before_launch(&request.facts, &host, &admission, &needed, true);
            let destination = DestinationFacts {
                host,
                images: request.facts.images_for(&machine.disks),
                machine,
                pid: 1,
                backing: Ok(vec![Backing::default(); layout.backends().len()]),
                reserved: false,
                needed,
                uplinks: Vec::new(),
            };
            let mut findings = preflight::after_launch(&request.facts, &destination, &admission);
            preflight::settle(&mut findings, request.force);
            let _ = preflight::refusal(&request.vm, "host", &findings);
        }
        Message::Examined(examined) => {
            let mut findings = examined.findings.clone();
            preflight::settle(&mut findings, true);
            let _ = preflight::notes(&findings);
            let _ = preflight::refusal("vm", "host", &findings);
        }
        Message::RoundClosed { losses, .. } => {
            for lane in losses {
                let lost: u64 = lane.missing.iter().map(|&(start, end)| u64::from(end - start)).sum();
                assert!(lost <= u64::from(u32::MAX), "more frames are lost than can be numbered");
            }
        }
        _ => {}
    }
}

/// A VM's definition.
pub fn definition(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(vm) = VmDefinition::parse(text, "web") {
        assert!(vm.qmp.is_absolute());
        assert_eq!(vm.incoming_command().is_some(), vm.command.is_some());
        vm.preallocates();
    }
}

/// An agent's configuration.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(config) = AgentConfig::parse(text) {
        assert!(config.migration.port != 0 && !config.ciphers.is_empty());
        assert_ne!(config.migration.channels, Some(0));
        if let Some(cpus) = &config.migration.cpus {
            assert!(cpus.count() > 0, "somewhere to run");
            assert_eq!(cpus.to_string().parse().as_ref(), Ok(cpus), "written as it is read");
        }
        if config.insecure {
            let everybody = config.allow.send.is_none() && config.allow.receive.is_none();
            assert!(everybody && config.encryption != Some(Encryption::Required), "without certificates");
        }
        for pause in config.announce.pauses() {
            assert!(pause.as_millis() <= u128::from(config.announce.max));
        }
        // Instants cannot be beyond what the clock counts.
        let _ = std::time::Instant::now() + crate::migration::Limits::of(config.limits.silence);
    }
}

/// A handover journal.
pub fn journal(data: &[u8]) {
    crate::migration::fuzz_journal(data);
}

/// What a monitor sends.
pub fn qmp(data: &[u8]) {
    crate::vmm::fuzz_qmp(data);
}

/// A process's memory map.
pub fn maps(data: &[u8]) {
    crate::memory::fuzz_maps(&String::from_utf8_lossy(data));
}

/// An Ethernet frame, in which the XDP program looks for its datagram.
pub fn locate(data: &[u8]) {
    let found = locate::datagram(data, PORT);
    assert_eq!(found, reference(data));
    if let Some(found) = found {
        assert!(found.payload_offset <= data.len());
    }
    let claim = match found {
        Some(plain) => Some(Claim::Plain(plain)),
        None => (claimed_port(data) == Some(PORT)).then_some(Claim::Unsupported),
    };
    assert_eq!(locate::claim(data, PORT), claim);
}

/// UDP port of a frame behind whatever headers, in other words than `locate`'s.
fn claimed_port(frame: &[u8]) -> Option<u16> {
    let be16 = |bytes: &[u8]| Some(u16::from_be_bytes(bytes.get(..2)?.try_into().ok()?));
    let mut rest = frame.get(12..)?;
    for _ in 0..locate::MAX_TAGS {
        if matches!(be16(rest)?, 0x8100 | 0x88a8) {
            rest = rest.get(4..)?;
        }
    }
    let (ethertype, packet) = (be16(rest)?, &rest[2..]);
    let version = packet.first()? >> 4;
    let udp = match (ethertype, version) {
        (0x0800, 4) => {
            let first = packet.get(..20)?;
            let words = usize::from(first[0] % 16);
            let is_udp = first[9] == 17 && be16(&first[6..])? % 0x2000 == 0;
            (is_udp && words >= 5).then(|| packet.get(words * 4..))??
        }
        (0x86dd, 6) => behind_chain(*packet.get(6)?, packet.get(40..)?, locate::MAX_EXTENSIONS)?,
        _ => return None,
    };
    be16(udp.get(2..)?)
}

/// What follows a chain of IPv6 extension headers, if that is UDP.
fn behind_chain(kind: u8, rest: &[u8], left: usize) -> Option<&[u8]> {
    if kind == 17 {
        return Some(rest);
    }
    let header = rest.get(..4).filter(|_| left > 0)?;
    let len = match kind {
        0 | 43 | 60 => 8 + 8 * usize::from(header[1]),
        44 if u16::from_be_bytes([header[2], header[3]]) < 8 => 8,
        _ => return None,
    };
    behind_chain(header[0], rest.get(len..)?, left - 1)
}

/// The same in other words, for comparison.
fn reference(frame: &[u8]) -> Option<Datagram> {
    let be16 = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let ip = if be16(12)? == 0x8100 { 18 } else { 14 };
    let rest = frame.get(ip..)?;
    let (source, udp) = match be16(ip - 2)? {
        0x0800 => {
            let header = rest.get(..20)?;
            // More fragments, the reserved bit apart: 0x8000 means nothing.
            let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff;
            if header[0] != 0x45 || fragment != 0 || header[9] != 17 {
                return None;
            }
            let address = std::net::Ipv4Addr::new(header[12], header[13], header[14], header[15]);
            (address.to_ipv6_mapped().octets(), ip + 20)
        }
        0x86dd => {
            let header = rest.get(..8)?;
            if header[0] & 0xf0 != 0x60 || header[6] != 17 {
                return None;
            }
            (rest.get(8..24)?.try_into().ok()?, ip + 40)
        }
        _ => return None,
    };
    let header = frame.get(udp..udp + 8)?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    (u16::from_be_bytes([header[2], header[3]]) == PORT).then_some(Datagram {
        source,
        payload_offset: udp + 8,
        payload_len: length.saturating_sub(8),
    })
}
