//! Frames that must not get in, by what is wrong with them; and frames that are nobody's but the kernel's.

use migrate_common::wire::{HEADER_LEN, MAGIC, MAX_DESCRIPTORS, VERSION};

use super::envelope::{Envelope, Form, checksum};
use super::{Intruder, Stream};
use crate::lab::plan::{MIGRATION_PORT, Side};

/// Source port of what is forged without having sniffed a better one.
pub(super) const SOURCE_PORT: u16 = 50_000;
/// Number of a migration that there is not.
const NO_SESSION: [u8; 8] = [0x5a; 8];
/// A page that no guest of the lab has, of 4096 bytes each.
const NO_PAGE: u64 = 1 << 40;
/// EtherTypes.
const ARP: [u8; 2] = [0x08, 0x06];
const EXPERIMENTAL: [u8; 2] = [0x88, 0xb5];
const TCP: u8 = 6;
const ICMP: u8 = 1;

/// A frame to a host's data port, and the reason for which its bouncer is to drop it.
#[derive(Clone, Debug)]
pub struct Kind {
    /// What is wrong with it.
    pub name: String,
    /// The agent's name for the reason.
    pub reason: &'static str,
    /// The frame.
    pub frame: Vec<u8>,
}

/// A frame's header as any version of the page stream begins: magic, version, kind, no descriptors, session.
fn header() -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..4].copy_from_slice(&MAGIC);
    // A probe: it needs no descriptors.
    (header[4], header[5]) = (VERSION, 2);
    header[8..16].copy_from_slice(&NO_SESSION);
    header
}

impl Kind {
    /// What can be sent without knowing of any migration, in the name of `side`'s peer.
    pub fn blind(intruder: &Intruder, side: Side) -> Vec<Self> {
        let with = |at: usize, bytes: &[u8]| {
            let mut header = header();
            header[at..at + bytes.len()].copy_from_slice(bytes);
            header.to_vec()
        };
        let descriptors = (MAX_DESCRIPTORS as u16 + 1).to_le_bytes();
        let plain: [(&str, &'static str, Vec<u8>); 8] = [
            ("64 bytes", "truncated", Vec::new()),
            ("half a header", "truncated", header()[..HEADER_LEN / 2].to_vec()),
            (
                "text",
                "bad-magic",
                b"GET / HTTP/1.1\r\nHost: the wrong port, and long enough\r\n\r\n".to_vec(),
            ),
            ("a version to come", "bad-version", with(4, &[VERSION + 1])),
            ("an unknown kind", "malformed", with(5, &[77])),
            ("too many descriptors", "malformed", with(6, &descriptors)),
            ("less than it says", "truncated", with(28, &4096u32.to_le_bytes())),
            ("more than it says", "truncated", [&header()[..], &[0; 100]].concat()),
        ];
        let envelope = envelope(intruder, side, Form::Plain);
        let mut kinds: Vec<Self> = plain
            .into_iter()
            .map(|(name, reason, payload)| Self {
                name: name.to_owned(),
                reason,
                frame: envelope.wrap(&payload),
            })
            .collect();
        // The datagram says that it is longer than the frame that it is in.
        let mut lying = envelope.wrap(&with(28, &4096u32.to_le_bytes()));
        lying[38..40].copy_from_slice(&(8 + HEADER_LEN as u16 + 4096).to_be_bytes());
        kinds.push(Self {
            name: "a datagram beyond its frame".to_owned(),
            reason: "truncated",
            frame: lying,
        });
        for form in [Form::Plain, Form::Tagged, Form::Mapped] {
            let frame = Envelope { form, ..envelope }.wrap(&header());
            kinds.push(Self { name: format!("no such session, {form:?}"), reason: "unknown-session", frame });
        }
        kinds.extend(Form::UNSUPPORTED.map(|form| Self {
            name: format!("{form:?}"),
            reason: "unsupported",
            frame: Envelope { form, ..envelope }.wrap(&header()),
        }));
        kinds
    }

    /// What can be sent to `side` of a migration that was sniffed, and must not get in: frames that are sound but for who
    /// sends them, or how.
    pub fn knowing(intruder: &Intruder, side: Side, stream: Stream) -> Vec<Self> {
        let payload = stream.pages(&[NO_PAGE], 0x66, u32::MAX / 2);
        let peer = envelope(intruder, side, Form::Plain);
        let own = Envelope { from: intruder.own(), ..peer };
        // With the peer's Ethernet address, as far as the switch lets it.
        let half = Envelope { from: super::End { mac: peer.from.mac, ..own.from }, ..peer };
        let ipv6 = Envelope { from: intruder.own_ipv6(), ..peer };
        let strangers = [
            ("own address", own),
            ("own IP address", half),
            ("own address, tagged", Envelope { form: Form::Tagged, ..own }),
            ("own address in IPv6", Envelope { form: Form::Mapped, ..own }),
            ("an IPv6 address", ipv6),
        ];
        let strangers = strangers.into_iter().map(|(name, envelope)| Self {
            name: name.to_owned(),
            reason: "wrong-peer",
            frame: envelope.wrap(&payload),
        });
        let forms = Form::UNSUPPORTED.into_iter().map(|form| Self {
            name: format!("{form:?} of the session"),
            reason: "unsupported",
            frame: Envelope { form, ..peer }.wrap(&payload),
        });
        strangers.chain(forms).collect()
    }
}

/// Everything that is read off a data frame from `side`'s peer.
fn envelope(intruder: &Intruder, side: Side, form: Form) -> Envelope {
    Envelope {
        from: intruder.host(side.other()),
        to: intruder.host(side),
        ports: (SOURCE_PORT, MIGRATION_PORT),
        form,
    }
}

/// Frames to `side` that are none of the page stream's business, with what they are.
pub fn not_ours(intruder: &Intruder, side: Side) -> Vec<(&'static str, Vec<u8>)> {
    let plain = Envelope { from: intruder.own(), ..envelope(intruder, side, Form::Plain) };
    let to_port = |port: u16| Envelope { ports: (SOURCE_PORT, port), ..plain };
    let ethernet = |ethertype: [u8; 2], body: &[u8]| {
        let mut frame = [plain.to.mac, plain.from.mac].concat();
        frame.extend(ethertype);
        frame.extend(body);
        frame.resize(frame.len().max(super::envelope::SHORTEST), 0);
        frame
    };
    let mut ping = vec![8, 0, 0, 0, 0x12, 0x34, 0, 1];
    ping.extend([0x5a; 32]);
    let sum = checksum(&ping);
    ping[2..4].copy_from_slice(&sum.to_be_bytes());
    // A SYN, long enough to need no padding, which the kernel cuts off before it shows the frame.
    let mut tcp = [SOURCE_PORT.to_be_bytes(), MIGRATION_PORT.to_be_bytes()].concat();
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0x10, 0, 0, 0, 0, 0]);
    tcp.extend([0x5a; 32]);
    vec![
        ("an ARP request", ethernet(ARP, &[0, 1, 8, 0, 6, 4, 0, 1])),
        ("an EtherType for experiments", ethernet(EXPERIMENTAL, &[0x5a; 64])),
        ("a ping", plain.wrap_ip(ICMP, &ping)),
        ("TCP to the data port's number", plain.wrap_ip(TCP, &tcp)),
        ("UDP to the port before", to_port(MIGRATION_PORT - 1).wrap(&header())),
        ("UDP from the data port", Envelope { ports: (MIGRATION_PORT, 9), ..plain }.wrap(&header())),
        ("options, another port", Envelope { form: Form::Options, ..to_port(9) }.wrap(&header())),
        ("extension headers, another port", Envelope { form: Form::Chain, ..to_port(9) }.wrap(&header())),
        ("a later fragment", Envelope { form: Form::LaterFragment, ..plain }.wrap(&header())),
    ]
}
