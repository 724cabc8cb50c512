//! Whether a message can be meant: every number, list and range in it has a bound, looked at before anything is done
//! with it. What is true of one message alone is checked here; what depends on this host is checked where it is known.

use migrate_common::{PAGE_SIZE, maps::MAX_QUEUES};

use super::{Message, Prepare, Prepared};
use crate::{datapath::LaneLosses, memory::RESERVE_CHUNK, preflight::SourceFacts};

/// Most lanes of a page stream: a NIC's queues.
const MAX_LANES: usize = MAX_QUEUES as usize;
/// Largest guest, bytes (64 TiB): more than any host has, and far from where byte counts would not fit 64 bits.
const MAX_RAM: u64 = 1 << 46;
/// Most memory backends; the page stream numbers them with 16 bits.
const MAX_BACKENDS: usize = 1024;
/// Most of what a machine has several of: vCPUs, devices, NICs, disks …
const MAX_PARTS: usize = 16_384;
/// Blocks of an image that are compared: the other side reads as many.
const MAX_SAMPLES: usize = 64;
/// Most ways of packing that a host may name.
const MAX_CODECS: usize = 16;
/// Most ciphers that a host may name.
const MAX_CIPHERS: usize = 16;
/// Most findings of a host.
const MAX_FINDINGS: usize = 4096;
/// Longest name, bytes.
const MAX_NAME: usize = 256;
/// Longest reason, bytes: it may hold all of a preflight's findings, or a QEMU's last words.
const MAX_REASON: usize = 1 << 20;

fn most(what: &str, count: usize, most: usize) -> Result<(), String> {
    if count > most { Err(format!("{count} {what}; at most {most} can be meant")) } else { Ok(()) }
}

fn name(what: &str, text: &str) -> Result<(), String> {
    if text.len() > MAX_NAME {
        return Err(format!("{what} of {} bytes; at most {MAX_NAME} can be meant", text.len()));
    }
    Ok(())
}

impl Message {
    /// Whether all of it is within bounds.
    ///
    /// # Errors
    /// What is not, in words.
    pub(super) fn check(&self) -> Result<(), String> {
        let checked = match self {
            Self::Hello { software, name: host, .. } => {
                name("a version", software).and_then(|()| name("a host's name", host))
            }
            Self::Prepare(request) => prepare(request),
            Self::Examined(examined) => most("findings", examined.findings.len(), MAX_FINDINGS)
                .and_then(|()| examined.prepared.as_ref().map_or(Ok(()), prepared)),
            Self::RoundEnd { frames, .. } => most("lanes", frames.len(), MAX_LANES),
            Self::RoundClosed { losses, queues, .. } => {
                lost(losses).and_then(|()| most("queues", queues.len(), MAX_LANES))
            }
            Self::Died { reason } | Self::Abort { reason } => {
                most("bytes of a reason", reason.len(), MAX_REASON)
            }
            Self::Probed { .. }
            | Self::ProbeResult { .. }
            | Self::StateEnd { .. }
            | Self::Loaded { .. }
            | Self::Commit(_)
            | Self::Running(_)
            | Self::Done
            | Self::Settle { .. }
            | Self::Claim { .. }
            | Self::Settled { .. } => Ok(()),
        };
        checked.map_err(|problem| format!("{}: {problem}", self.name()))
    }
}

fn prepare(request: &Prepare) -> Result<(), String> {
    name("a migration's name", &request.id)?;
    name("a VM's name", &request.vm)?;
    most("feedback ports", request.feedback_ports.len(), MAX_LANES)?;
    if request.feedback_ports.contains(&0) {
        return Err("a feedback port is 0".into());
    }
    most("ciphers", request.encryption.ciphers.len(), MAX_CIPHERS)?;
    let ram = facts(&request.facts)?;
    let chunks = (ram / PAGE_SIZE as u64).div_ceil(RESERVE_CHUNK);
    let mut last = 0;
    for &(start, end) in &request.populated {
        if start < last || end <= start || end > chunks {
            return Err(format!(
                "the range {start}..{end} of memory is empty, out of order or beyond its {chunks} parts"
            ));
        }
        last = end;
    }
    Ok(())
}

/// Returns the size of RAM, bytes.
fn facts(facts: &SourceFacts) -> Result<u64, String> {
    let machine = &facts.machine;
    most("memory backends", machine.backends.len(), MAX_BACKENDS)?;
    let lists = [
        ("vCPUs", machine.vcpus.len()),
        ("NUMA nodes", machine.numa.len()),
        ("devices", machine.devices.len()),
        ("NICs", machine.nics.len()),
        ("disks", machine.disks.len()),
        ("images", facts.images.len()),
        ("backings", facts.backing.len()),
        ("pools of huge pages", facts.host.huge_pools.len()),
        ("words of CPU features", machine.cpu.words.as_ref().map_or(0, Vec::len)),
        ("words of CPU features", machine.cpu.filtered.len()),
        ("CPU features", machine.cpu.named.len()),
    ];
    lists.into_iter().try_for_each(|(what, count)| most(what, count, MAX_PARTS))?;
    for image in &facts.images {
        most("blocks of an image", image.samples.len(), MAX_SAMPLES)?;
        most("writers of an image", image.writers.len(), MAX_PARTS)?;
    }
    most("bytes of a reason", facts.host.nic.fallback.as_ref().map_or(0, String::len), MAX_REASON)?;
    let mut ram: u64 = 0;
    for backend in &machine.backends {
        if !backend.size.is_multiple_of(PAGE_SIZE as u64) {
            return Err(format!("a memory backend of {} bytes is no whole number of pages", backend.size));
        }
        ram = ram.saturating_add(backend.size);
    }
    if ram > MAX_RAM {
        return Err(format!("{ram} bytes of RAM; at most {MAX_RAM} can be meant"));
    }
    Ok(ram)
}

fn prepared(prepared: &Prepared) -> Result<(), String> {
    name("a transport", &prepared.transport)?;
    most("ways of packing", prepared.unpacks.len(), MAX_CODECS)?;
    if prepared.port == 0 {
        return Err("the page stream's port is 0".into());
    }
    if prepared.window == 0 {
        return Err("a window of 0 frames, in which nothing can be sent".into());
    }
    Ok(())
}

/// Ranges in order and apart: a frame that is named twice would cost its pages' look-up twice.
fn lost(losses: &[LaneLosses]) -> Result<(), String> {
    most("lanes", losses.len(), MAX_LANES)?;
    let mut next_lane = 0;
    for lane in losses {
        if lane.lane < next_lane || usize::from(lane.lane) >= MAX_LANES {
            return Err(format!("lane {} is out of order or not below {MAX_LANES}", lane.lane));
        }
        next_lane = lane.lane + 1;
        let mut last = 0;
        for &(start, end) in &lane.missing {
            if start < last || end <= start {
                return Err(format!("the range {start}..{end} of frames is empty or out of order"));
            }
            last = end;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        datapath::Codec,
        fuzzing::seeds::{every_message, prepare as good},
        memory::Backend,
        preflight::{ImageFacts, Sample},
    };

    #[test]
    fn what_agents_say_is_within_bounds() {
        for message in every_message() {
            message.check().unwrap();
        }
    }

    fn refused(change: impl FnOnce(&mut Prepare)) -> String {
        let mut request = good();
        change(&mut request);
        Message::Prepare(Box::new(request)).check().unwrap_err()
    }

    #[test]
    fn a_prepare_that_cannot_be_meant_is_refused_with_a_reason() {
        assert!(refused(|r| r.feedback_ports = vec![1; 65]).contains("65 feedback ports"));
        assert!(refused(|r| r.feedback_ports[0] = 0).contains("port is 0"));
        for ranges in [vec![(3, 3)], vec![(4, 3)], vec![(2, 4), (1, 2)], vec![(2, 4), (3, 5)], vec![(0, 33)]]
        {
            assert!(refused(|r| r.populated = ranges).contains("range"));
        }
        assert!(refused(|r| r.populated = vec![(u64::MAX - 1, u64::MAX)]).contains("beyond"));
        let backend = |size| Backend { id: "ram".into(), size };
        assert!(refused(|r| r.facts.machine.backends = vec![backend(4097)]).contains("whole number"));
        let huge = vec![backend(!4095); 3];
        assert!(refused(|r| r.facts.machine.backends = huge).contains("bytes of RAM"));
        assert!(refused(|r| r.facts.machine.backends = vec![backend(4096); 1025]).contains("1025 memory"));
        assert!(refused(|r| r.facts.machine.devices = vec![String::new(); 16_385]).contains("devices"));
        let samples = vec![Sample { offset: 0, hash: None }; 65];
        let image = ImageFacts { samples, ..ImageFacts::default() };
        assert!(refused(|r| r.facts.images = vec![image]).contains("65 blocks of an image"));
        assert!(
            refused(|r| r.facts.host.nic.fallback = Some("x".repeat(MAX_REASON + 1))).contains("a reason")
        );
        assert!(refused(|r| r.id = "x".repeat(257)).contains("257 bytes"));
        assert!(refused(|r| r.vm = "x".repeat(257)).contains("257 bytes"));
    }

    #[test]
    fn losses_are_in_order_and_apart() {
        let closed = |losses: &[(u16, &[(u32, u32)])]| {
            let lane =
                |&(lane, missing): &(u16, &[(u32, u32)])| LaneLosses { lane, missing: missing.to_vec() };
            Message::RoundClosed { epoch: 1, losses: losses.iter().map(lane).collect(), queues: Vec::new() }
                .check()
        };
        closed(&[(0, &[(0, 1), (1, 2), (5, u32::MAX)]), (63, &[])]).unwrap();
        assert!(closed(&[(0, &[(2, 1)])]).unwrap_err().contains("2..1"));
        assert!(closed(&[(0, &[(0, 5), (4, 6)])]).unwrap_err().contains("4..6"));
        assert!(closed(&[(1, &[]), (1, &[])]).unwrap_err().contains("lane 1"));
        assert!(closed(&[(64, &[])]).unwrap_err().contains("lane 64"));
        assert!(closed(&[(u16::MAX, &[])]).is_err());
    }

    #[test]
    fn other_lists_are_bounded_too() {
        let frames = vec![0; 65];
        assert!(
            Message::RoundEnd { epoch: 1, frames, last: false, transit_us: 0 }
                .check()
                .unwrap_err()
                .contains("65 lanes")
        );
        assert!(Message::Abort { reason: "x".repeat(MAX_REASON + 1) }.check().is_err());
        let mut examined = every_message().swap_remove(2);
        if let Message::Examined(examined) = &mut examined
            && let Some(prepared) = &mut examined.prepared
        {
            prepared.unpacks = vec![Codec::Lz4; 17];
        }
        assert!(examined.check().unwrap_err().contains("17 ways of packing"));
        let mut hello = Message::hello("a");
        if let Message::Hello { name, .. } = &mut hello {
            *name = "x".repeat(257);
        }
        assert!(hello.check().unwrap_err().starts_with("hello: a host's name"));
    }
}
