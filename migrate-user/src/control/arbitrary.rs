//! Any message that can be meant, for property tests.

use proptest::{
    collection::{btree_map, btree_set, vec},
    option,
    prelude::*,
    sample::select,
};

use super::{Commit, Examined, Message, Prepare, Prepared, Running, VerifyMode};
use crate::{
    datapath::{Cipher, Codec, Encryption, LaneLosses, Offer, QueueFigures},
    memory::{Backend, Digest},
    network::Mac,
    preflight::{Check, Finding, ImageFacts, Sample, SourceFacts, Verdict},
    vmm::{CpuFacts, Disk, FeatureWord, VmNic},
};

/// A few characters of any kind.
const TEXT: &str = ".{0,30}";

fn ranges() -> impl Strategy<Value = Vec<(u32, u32)>> {
    btree_set(any::<u32>(), 0..8).prop_map(|bounds| {
        let bounds: Vec<u32> = bounds.into_iter().collect();
        bounds.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
    })
}

fn losses() -> impl Strategy<Value = Vec<LaneLosses>> {
    let lanes = btree_map(0u16..64, ranges(), 0..5);
    lanes.prop_map(|lanes| lanes.into_iter().map(|(lane, missing)| LaneLosses { lane, missing }).collect())
}

fn queues() -> impl Strategy<Value = Vec<QueueFigures>> {
    let figures = (any::<u32>(), any::<[u64; 3]>()).prop_map(|(queue, [frames, corrupt, stale])| {
        QueueFigures { queue, frames, corrupt, stale, ..QueueFigures::default() }
    });
    vec(figures, 0..4)
}

fn digests() -> impl Strategy<Value = Option<Digest>> {
    any::<Option<[u8; 16]>>().prop_map(|digest| digest.map(Digest))
}

fn findings() -> impl Strategy<Value = Vec<Finding>> {
    let checks = [Check::Monitor, Check::VmState, Check::CpuFeatures, Check::ClockOffset, Check::RamRoom];
    let verdicts = [Verdict::Good, Verdict::Warning, Verdict::Bad, Verdict::Unknown];
    let finding = (select(checks.to_vec()), select(verdicts.to_vec()), TEXT, TEXT, any::<[bool; 2]>())
        .prop_map(|(check, verdict, found, remedy, [overridable, overridden])| Finding {
            check,
            verdict,
            found,
            remedy,
            overridable,
            overridden,
        });
    vec(finding, 0..4)
}

fn ciphers() -> impl Strategy<Value = Cipher> {
    select(vec![Cipher::Aes128Gcm, Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305])
}

fn offers() -> impl Strategy<Value = Offer> {
    let encryptions = vec![Encryption::Required, Encryption::Preferred, Encryption::Off];
    (select(encryptions), vec(ciphers(), 0..4))
        .prop_map(|(encryption, ciphers)| Offer { encryption, ciphers })
}

fn prepared() -> impl Strategy<Value = Prepared> {
    let nic = (any::<std::net::IpAddr>(), any::<[u8; 6]>(), any::<u16>(), any::<bool>());
    let unpacks = select(vec![vec![], vec![Codec::Lz4], Codec::ALL.to_vec()]);
    (nic, 1u16.., 1u32.., option::of(ciphers()), unpacks, TEXT).prop_map(
        |((ip, mac, mtu, single_buffer), port, window, cipher, unpacks, transport)| Prepared {
            ip,
            mac: Mac(mac),
            mtu: mtu.into(),
            single_buffer,
            port,
            window,
            cipher,
            unpacks,
            transport,
        },
    )
}

fn cpus() -> impl Strategy<Value = CpuFacts> {
    let word = (any::<u32>(), any::<Option<u32>>(), TEXT, any::<u32>())
        .prop_map(|(leaf, subleaf, register, bits)| FeatureWord { leaf, subleaf, register, bits });
    (option::of(vec(word.clone(), 0..4)), vec(word, 0..3), btree_set(TEXT, 0..4), TEXT, any::<[u64; 3]>())
        .prop_map(|(words, filtered, named, model, signature)| CpuFacts {
            model,
            signature,
            words,
            filtered,
            named,
            ..CpuFacts::default()
        })
}

fn images() -> impl Strategy<Value = Vec<ImageFacts>> {
    let sample = any::<(u64, Option<u64>)>().prop_map(|(offset, hash)| Sample { offset, hash });
    let image =
        (any::<Option<(u64, u64)>>(), vec(sample, 0..4), option::of(TEXT), vec((any::<u32>(), TEXT), 0..3))
            .prop_map(|(inode, samples, unread, writers)| ImageFacts { inode, samples, unread, writers });
    vec(image, 0..3)
}

fn disks() -> impl Strategy<Value = Vec<Disk>> {
    let disk = ([TEXT, TEXT, TEXT], any::<u64>(), any::<bool>()).prop_map(
        |([device, image, format], size, read_only)| Disk { device, image, format, size, read_only },
    );
    vec(disk, 0..3)
}

/// Facts with as many pages as each backend has.
fn facts() -> impl Strategy<Value = SourceFacts> {
    let backend = (TEXT, 0u64..1 << 32)
        .prop_map(|(id, pages)| Backend { id, size: pages * migrate_common::PAGE_SIZE as u64 });
    let nic = (any::<[u8; 6]>(), option::of(TEXT)).prop_map(|(mac, bridge)| VmNic { mac: Mac(mac), bridge });
    let texts = || vec(TEXT, 0..4);
    (vec(backend, 0..4), cpus(), images(), disks(), vec(nic, 0..3), [texts(), texts(), texts()], any::<u32>())
        .prop_map(|(backends, cpu, images, disks, nics, [vcpus, numa, devices], pid)| {
            // What is not arbitrary is as on a real host.
            let mut facts = crate::preflight::test_pair().0;
            let machine = &mut facts.machine;
            (machine.backends, machine.cpu, machine.disks, machine.nics) = (backends, cpu, disks, nics);
            (machine.vcpus, machine.numa, machine.devices) = (vcpus, numa, devices);
            (facts.images, facts.pid) = (images, pid);
            facts
        })
}

fn prepares() -> impl Strategy<Value = Prepare> {
    let verify = select(vec![None, Some(VerifyMode::Hash), Some(VerifyMode::Full)]);
    let numbers = (any::<u64>(), any::<u16>(), any::<u16>(), vec(1u16.., 0..64));
    (
        facts(),
        numbers,
        [TEXT, TEXT],
        any::<[u8; 6]>(),
        any::<std::net::IpAddr>(),
        (verify, offers()),
        any::<[bool; 3]>(),
        any::<[u8; 4]>(),
    )
        .prop_map(|(facts, numbers, [id, vm], mac, ip, (verify, encryption), flags, parts)| {
            let (session, control_port, mtu, feedback_ports) = numbers;
            let pages: u64 = facts.machine.backends.iter().map(|backend| backend.size).sum::<u64>()
                / migrate_common::PAGE_SIZE as u64;
            // Ranges in order, within the RAM.
            let chunks = pages.div_ceil(crate::memory::RESERVE_CHUNK);
            let mut bounds: Vec<u64> = parts.iter().map(|&part| chunks * u64::from(part) / 256).collect();
            bounds.sort_unstable();
            bounds.dedup();
            let populated = bounds.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
            let [single_buffer, force, check_only] = flags;
            Prepare {
                session,
                id,
                control_port,
                vm,
                facts,
                populated,
                mtu: mtu.into(),
                single_buffer,
                ip,
                mac: Mac(mac),
                encryption,
                feedback_ports,
                verify,
                force,
                check_only,
            }
        })
}

fn runnings() -> impl Strategy<Value = Running> {
    (any::<u16>(), any::<u32>(), any::<u32>(), digests()).prop_map(
        |(ms, announced, announcements, digest)| {
            // A number of ms that text holds exactly.
            Running { resume_ms: f64::from(ms) / 8.0, announced, announcements, digest }
        },
    )
}

fn rounds() -> impl Strategy<Value = Message> {
    prop_oneof![
        (any::<u32>(), vec(any::<u32>(), 0..64), any::<bool>(), any::<u64>()).prop_map(
            |(epoch, frames, last, transit_us)| Message::RoundEnd { epoch, frames, last, transit_us }
        ),
        (any::<u32>(), losses(), queues()).prop_map(|(epoch, losses, queues)| Message::RoundClosed {
            epoch,
            losses,
            queues
        }),
        any::<u32>().prop_map(|frames| Message::Probed { frames }),
        any::<u64>().prop_map(|frames| Message::ProbeResult { frames }),
    ]
}

fn ends() -> impl Strategy<Value = Message> {
    prop_oneof![
        any::<u64>().prop_map(|bytes| Message::StateEnd { bytes }),
        digests().prop_map(|digest| Message::Loaded { digest }),
        digests().prop_map(|digest| Message::Commit(Commit { digest })),
        runnings().prop_map(Message::Running),
        ".{0,300}".prop_map(|reason| Message::Died { reason }),
        Just(Message::Done),
        any::<u64>().prop_map(|session| Message::Settle { session }),
        any::<(u64, bool)>().prop_map(|(session, whole)| Message::Claim { session, whole }),
        any::<bool>().prop_map(|accepted| Message::Settled { accepted }),
        ".{0,300}".prop_map(|reason| Message::Abort { reason }),
    ]
}

/// Any message that can be meant.
pub(super) fn messages() -> impl Strategy<Value = Message> {
    let hello = (any::<u32>(), TEXT, TEXT, any::<Option<u64>>())
        .prop_map(|(protocol, software, name, clock)| Message::Hello { protocol, software, name, clock });
    let examined = (findings(), option::of(prepared()))
        .prop_map(|(findings, prepared)| Message::Examined(Box::new(Examined { findings, prepared })));
    let prepare = prepares().prop_map(|request| Message::Prepare(Box::new(request)));
    prop_oneof![2 => hello, 4 => prepare, 3 => examined, 4 => rounds(), 6 => ends()]
}

/// How many kinds of messages there are.
const KINDS: usize = 17;

#[test]
fn every_kind_of_message_is_among_them() {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    let (strategy, mut names) = (messages(), std::collections::BTreeSet::new());
    while names.len() < KINDS {
        names.insert(strategy.new_tree(&mut runner).unwrap().current().name());
    }
    assert_eq!(names.len(), crate::fuzzing::seeds::every_message().len());
}
