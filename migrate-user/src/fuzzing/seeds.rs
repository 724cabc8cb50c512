//! The corpora in the repository: made by the real encoders, and replayed.

use std::path::{Path, PathBuf};

use migrate_common::wire::{
    DESCRIPTOR_LEN, FrameHeader, FrameKind, Guard, HEADER_LEN, Packing, PageDescriptor,
};

use super::*;
use crate::{
    control::{Commit, Prepare, Prepared, Running, VerifyMode},
    datapath::{Cipher, Codec, Encryption, LaneLosses, Method, Offer, Packer},
    preflight::{Check, Finding},
};

type Target = (&'static str, fn(&[u8]), fn() -> Vec<(String, Vec<u8>)>);

const TARGETS: [Target; 9] = [
    ("frame", frame, frames),
    ("feedback", feedback, feedbacks),
    ("control", control, messages),
    ("definition", definition, || {
        texts(&[("full", DEFINITION), ("least", "name = \"web\"\nqmp = \"/q\"\n")])
    }),
    ("config", config, || {
        texts(&[("full", CONFIG), ("least", LEAST_CONFIG), ("certificates", SECURE_CONFIG)])
    }),
    ("journal", journal, journals),
    ("qmp", qmp, || texts(&[("start", QMP_START), ("answers", QMP_ANSWERS), ("huge-time", QMP_HUGE_TIME)])),
    ("maps", maps, || texts(&[("whole", MAPS), ("backwards", MAPS_BACKWARDS)])),
    ("locate", locate, packets),
];

const DEFINITION: &str = r#"name = "web"
qmp = "/run/web.qmp"
command = ["qemu-system-x86_64", "{incoming}", "-m", "1G", "-object", "memory-backend-file,id=ram,prealloc=on"]
nics = [{ mac = "52:54:00:00:00:01", announce-on = "eno1" }, { mac = "52:54:00:00:00:02" }]
"#;
const LEAST_CONFIG: &str = r#"name = "a"
insecure = true
control = { listen = "[::1]:4790" }
migration = { interface = "eno2" }
"#;
const SECURE_CONFIG: &str = r#"name = "host-a"
pki-dir = "/etc/xferry/pki"
encryption = "preferred"
ciphers = ["aes-128-gcm", "chacha20-poly1305"]
[control]
listen = "10.0.0.1:4790"
[migration]
interface = "eno2"
[peers]
host-b = "10.0.0.2:4790"
[allow]
send = ["host-b"]
receive = []
"#;
const CONFIG: &str = r#"name = "host-a"
socket = "/run/xferry/xferry.sock"
state-dir = "/var/lib/xferry"
vms-dir = "/etc/xferry/vms"
insecure = true
[control]
listen = "10.0.0.1:4790"
[migration]
interface = "eno2"
port = 4791
queues = 2
channels = 4
cpus = "0-7:1/2,9"
[peers]
host-b = "10.0.0.2:4790"
[announce]
initial = 50
max = 550
rounds = 9
step = 100
[limits]
connect = 5
dead-peer = 10
hello = 5
prepare = 120
round = 15
silence = 30
switchover = 20
settle = 30
journal = 10
vmm-answer = 10
vmm-start = 60
vmm-step = 20
vmm-quit = 5
[admission]
max-arriving = 2
memory-headroom-mib = 64
"#;
const QMP_START: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#,
    "\r\n{\"return\": {}, \"id\": 1}\r\n"
);
const QMP_ANSWERS: &str = r#"{"timestamp": {"seconds": 1700000000, "microseconds": 123456}, "event": "STOP"}
{"timestamp": {"seconds": 1700000000, "microseconds": 5}, "event": "MIGRATION", "data": {"status": "completed"}}
{"id": 7, "error": {"class": "GenericError", "desc": "no such thing"}}
{"return": [{"qom-path": "/objects/ram"}], "id": 8}
"#;
/// Regression: the time in µs overflowed.
const QMP_HUGE_TIME: &str = r#"{"timestamp": {"seconds": 18446744073709551615, "microseconds": 18446744073709551615}, "event": "X"}
"#;
const MAPS: &str = "\
55d0c0a00000-55d0c0b00000 r-xp 00000000 fe:00 123                        /usr/bin/qemu-system-x86_64
7f0000000000-7f0000003000 rw-s 00000000 00:1a 42                         /dev/shm/ram
7f0000003000-7f0000004000 rw-s 00003000 00:1a 42                         /dev/shm/ram
7f1000000000-7f1000001000 rw-s 00000000 00:1a 43                         /dev/shm/qemu_back_mem.ram.aB3dE (deleted)
7f2000000000-7f2000001000 rw-p 00000000 00:1a 44                         /dev/shm/private
";
/// Regression: the length of a mapping that ends before it begins overflowed.
const MAPS_BACKWARDS: &str = "\
7f0000003000-7f0000000000 rw-s 00000000 00:1a 42                         /dev/shm/ram
0-ffffffffffffffff rw-s 00000000 00:1a 42                         /dev/shm/ram
";

fn texts(all: &[(&str, &str)]) -> Vec<(String, Vec<u8>)> {
    all.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect()
}

/// The part of a frame that the target does not put right itself, with flags and length before it.
fn framed(flags: u8, lane: u16, sequence: u32, descriptors: &[PageDescriptor]) -> Vec<u8> {
    let payload: usize = descriptors.iter().map(PageDescriptor::payload_len).sum();
    let header = FrameHeader {
        kind: FrameKind::Pages,
        descriptors: descriptors.len() as u16,
        session: 1,
        epoch: 1,
        lane,
        sequence,
        guard: Guard::Checksum,
        packing: Packing::Plain,
        payload: payload as u32,
        checksum: 0,
    };
    let mut body = header.to_bytes().to_vec();
    descriptors.iter().for_each(|descriptor| body.extend(descriptor.to_bytes()));
    body.extend((0..payload).map(|n| n as u8));
    [vec![flags], (body.len() as u16).to_le_bytes().to_vec(), body].concat()
}

/// The same with its payload packed.
fn packed(flags: u8, codec: Codec, descriptors: &[PageDescriptor]) -> Vec<u8> {
    let plain = framed(flags, 0, 0, descriptors);
    let (head, payload) = plain[3..].split_at(HEADER_LEN + descriptors.len() * DESCRIPTOR_LEN);
    let mut body = head.to_vec();
    body[23] = codec.packing() as u8;
    body.extend(Packer::default().pack(Method::by_name(codec), payload, usize::MAX).unwrap());
    [vec![flags], (body.len() as u16).to_le_bytes().to_vec(), body].concat()
}

/// A packed frame whose `descriptors` are another one's.
fn described_as(mut packed: Vec<u8>, descriptors: &[PageDescriptor]) -> Vec<u8> {
    let at = 3 + HEADER_LEN;
    for (to, descriptor) in packed[at..].chunks_exact_mut(DESCRIPTOR_LEN).zip(descriptors) {
        to.copy_from_slice(&descriptor.to_bytes());
    }
    packed
}

fn frames() -> Vec<(String, Vec<u8>)> {
    let data = |backend, page, offset, length| PageDescriptor::Data { backend, page, offset, length };
    let zero = |backend, page, pages| PageDescriptor::Zero { backend, page, pages };
    let probe = {
        let mut bytes = framed(0x30, 0, 0, &[]);
        bytes[3 + 5] = FrameKind::Probe as u8;
        bytes
    };
    let seeds = [
        ("fragment", framed(0x10, 0, 0, &[data(0, 2, 2048, 100)])),
        ("zeros", framed(2, 1, 0, &[zero(1, 0, 5), zero(0, 0, 3)])),
        ("mixed", framed(0x20, 3, 7, &[data(1, 4, 4090, 6), zero(0, 1, 2), data(0, 0, 0, 64)])),
        ("beyond", framed(0, 0, 0, &[data(0, 3, 0, 8)])),
        ("run-beyond", framed(0, 0, 1, &[zero(1, 4, u32::MAX)])),
        ("page-overflow", framed(0, 0, 1, &[zero(1, u64::MAX, 2), data(0, u64::MAX, 0, 8)])),
        (
            "twice-and-late",
            [framed(0, 0, 2, &[zero(0, 0, 1)]).repeat(2), framed(4, 0, 3, &[]), framed(0, 0, 0, &[])]
                .concat(),
        ),
        ("last-number", framed(0, 63, u32::MAX, &[zero(0, 0, 1)])),
        ("probe", probe),
        ("sealed", framed(8 | 0x10, 0, 0, &[data(1, 1, 8, 300), zero(0, 0, 2)])),
        ("guards", [framed(8, 0, 0, &[zero(0, 0, 1)]), framed(0x40, 0, 1, &[data(0, 0, 0, 9)])].concat()),
        ("sealed-in-vain", framed(0x40, 0, 0, &[zero(1, 0, 5)])),
        ("pages", framed(0x10, 62, 0, &[data(0, 2, 0, 4096), data(1, 0, 0, 4096)])),
        (
            "late",
            [framed(4, 0, 0, &[zero(0, 0, 1)]), framed(0, 0, 1, &[data(0, 0, 0, 64)]), framed(0, 64, 0, &[])]
                .concat(),
        ),
        ("packed-lz4", packed(0x10, Codec::Lz4, &[data(0, 1, 0, 4096), zero(0, 2, 1), data(1, 4, 0, 4096)])),
        ("packed-zstd", packed(0x20, Codec::Zstd, &[data(0, 0, 0, 4096), data(1, 0, 9, 600)])),
        ("packed-sealed", packed(8 | 0x10, Codec::Zstd, &[data(1, 2, 0, 4096)])),
        ("packed-short", described_as(packed(0, Codec::Lz4, &[data(0, 1, 0, 4095)]), &[data(0, 1, 0, 4096)])),
        ("packed-long", described_as(packed(0, Codec::Zstd, &[data(0, 1, 0, 4096)]), &[data(0, 1, 0, 4095)])),
        ("packed-nothing", described_as(packed(0, Codec::Lz4, &[data(0, 1, 0, 9)]), &[zero(0, 1, 1)])),
        ("packed-noise", {
            let mut bytes = framed(0, 0, 0, &[data(0, 1, 0, 64)]);
            bytes[3 + 23] = Codec::Zstd.packing() as u8;
            bytes
        }),
    ];
    seeds.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect()
}

fn feedbacks() -> Vec<(String, Vec<u8>)> {
    let one = Feedback { session: 0x0123_4567_89ab_cdef, epoch: 7, lane: 3, seen: 99, received: 98 };
    vec![("one".into(), one.to_bytes().to_vec())]
}

/// A `prepare` as an agent sends it, of a guest with 64 MiB.
pub(crate) fn prepare() -> Prepare {
    let mut facts = crate::preflight::test_pair().0;
    facts.machine.backends = vec![crate::memory::Backend { id: "ram".into(), size: 64 << 20 }];
    Prepare {
        session: 7,
        id: "host-a-1".into(),
        control_port: 4790,
        vm: "web".into(),
        facts,
        populated: vec![(0, 3), (5, 32)],
        mtu: 9000,
        single_buffer: false,
        ip: [10, 0, 0, 1].into(),
        mac: "52:54:00:00:00:01".parse().unwrap(),
        encryption: Offer { encryption: Encryption::Preferred, ciphers: vec![Cipher::Aes128Gcm] },
        feedback_ports: vec![50_000, 50_001],
        verify: Some(VerifyMode::Hash),
        force: false,
        check_only: false,
    }
}

/// One message of each kind.
pub(crate) fn every_message() -> Vec<Message> {
    let prepared = Prepared {
        ip: [10, 0, 0, 2].into(),
        mac: "52:54:00:00:00:02".parse().unwrap(),
        mtu: 9000,
        single_buffer: false,
        port: PORT,
        window: 512,
        cipher: Some(Cipher::Aes128Gcm),
        unpacks: vec![Codec::Lz4],
        transport: "eno2, driver".into(),
    };
    let findings = vec![Finding::bad(Check::VmState, "it is paused", "resume it")];
    vec![
        Message::Hello { protocol: 2, software: "0.1.0".into(), name: "host-a".into(), clock: Some(1) },
        Message::Prepare(Box::new(prepare())),
        Message::Examined(Box::new(crate::control::Examined { findings, prepared: Some(prepared) })),
        Message::Probed { frames: 8 },
        Message::ProbeResult { frames: 8 },
        Message::RoundEnd { epoch: 1, frames: vec![10, 20], last: false, transit_us: 500 },
        Message::RoundClosed {
            epoch: 1,
            losses: vec![LaneLosses { lane: 1, missing: vec![(0, 3), (5, 6)] }],
            queues: vec![crate::datapath::QueueFigures::default()],
        },
        Message::StateEnd { bytes: 100_000 },
        Message::Loaded { digest: None },
        Message::Commit(Commit { digest: None }),
        Message::Running(Running { resume_ms: 1.5, announced: 1, announcements: 5, digest: None }),
        Message::Died { reason: "a signal".into() },
        Message::Done,
        Message::Settle { session: 7 },
        Message::Claim { session: 7, whole: true },
        Message::Settled { accepted: true },
        Message::Abort { reason: "cancelled".into() },
    ]
}

fn messages() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    let mut stream = vec![1];
    for message in every_message() {
        // The clock is the only thing that differs from run to run.
        let json = serde_json::to_vec(&message).unwrap();
        stream.extend((json.len() as u32 + 1).to_be_bytes());
        stream.push(1);
        stream.extend(&json);
        seeds.push((message.name().to_owned(), [vec![0], json].concat()));
    }
    stream.extend([0, 0, 0, 4, 2, 1, 2, 3]);
    seeds.push(("stream".into(), stream));
    let text = |name: &str, json: &str| (name.to_owned(), [b"\0", json.as_bytes()].concat());
    seeds.push(text(
        "range-backwards",
        r#"{"type":"round-closed","epoch":1,"losses":[{"lane":0,"missing":[[9,3]]}]}"#,
    ));
    seeds
}

fn journals() -> Vec<(String, Vec<u8>)> {
    let records = [
        r#"{"record":"offered","session":9,"id":"a-1","vm":"web","peer":"10.0.0.2:4790","keep-source":false,"ram":["/dev/shm/web"]}"#,
        r#"{"record":"committed","session":9}"#,
        r#"{"record":"decided","session":9,"verdict":"accepted"}"#,
        r#"{"record":"concluded","session":9,"verdict":"accepted"}"#,
        r#"{"record":"waiting","session":3,"id":"b-1","vm":"web"}"#,
    ];
    let mut file = vec![1];
    for json in records {
        file.extend(format!("{:08x} {json}\n", crate::checksum::crc32c(json.as_bytes())).into_bytes());
    }
    let torn = file[..file.len() - 20].to_vec();
    let plain = [b"\0", records.join("\n").as_bytes()].concat();
    vec![("file".into(), file), ("torn".into(), torn), ("returned".into(), plain)]
}

fn packets() -> Vec<(String, Vec<u8>)> {
    let mut plain = vec![0u8; 12];
    plain.extend([0x08, 0x00]);
    plain.extend([0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let udp = [[0x12, 0x34], PORT.to_be_bytes(), [0, 12], [0, 0]].concat();
    plain.extend(&udp);
    plain.extend(*b"XFRY");
    let mut tagged = plain.clone();
    tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
    let mut six = vec![0u8; 12];
    six.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 12, 17, 64]);
    six.extend([0xfd; 32]);
    six.extend(&udp);
    six.extend(*b"XFRY");
    let mut stacked = tagged.clone();
    stacked.splice(12..12, [0x88, 0xa8, 0x00, 0x07]);
    let mut options = plain.clone();
    options[14] = 0x46;
    options.splice(34..34, [1, 1, 1, 0]);
    let mut fragment = plain.clone();
    fragment[20] = 0x20;
    let mut extended = six.clone();
    extended[20] = 0;
    // Hop-by-hop options, destination options of 16 bytes, a first fragment.
    extended.splice(54..54, [60, 0, 1, 4, 0, 0, 0, 0]);
    extended.splice(62..62, [44, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    extended.splice(78..78, [17, 0, 0, 1, 0, 0, 0, 7]);
    let seeds = [
        ("ipv4", plain),
        ("vlan", tagged),
        ("ipv6", six),
        ("stacked", stacked),
        ("options", options),
        ("fragment", fragment),
        ("extended", extended),
    ];
    seeds.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect()
}

pub(super) fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

/// `XFERRY_WRITE_SEEDS=1 cargo test -p migrate-user seeds_are` writes them anew.
#[test]
fn seeds_are_what_the_encoders_make() {
    for (target, _, seeds) in TARGETS {
        for (name, bytes) in seeds() {
            let path = corpus(target).join(name);
            if std::env::var_os("XFERRY_WRITE_SEEDS").is_some() {
                std::fs::create_dir_all(corpus(target)).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            let kept = std::fs::read(&path).unwrap_or_default();
            assert!(kept == bytes, "{} is not what the encoders make now", path.display());
        }
    }
}

#[test]
fn no_parser_is_hurt_by_its_corpus() {
    for (target, parser, _) in TARGETS {
        for entry in std::fs::read_dir(corpus(target)).unwrap() {
            parser(&std::fs::read(entry.unwrap().path()).unwrap());
        }
    }
}
