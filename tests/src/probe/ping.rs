//! Pings the VM without a pause and says how many got lost and for how long there was no answer.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use super::worker::{Workers, raise_priority};
use crate::lab::{lock, netns, wait_for};

/// Between two echo requests.
const INTERVAL: Duration = Duration::from_millis(5);
/// How long after a window an answer may come; then its ping counts as lost.
const GRACE: Duration = Duration::from_secs(1);
/// Echo request: ICMP header, our sequence number, and padding to what `ping` sends.
const REQUEST_LEN: usize = 64;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;

/// Sends an echo request every 5 ms and records each answer.
pub struct PingProbe {
    record: Arc<Mutex<Record>>,
    _workers: Workers,
}

/// A moment in the probe's life; two of them enclose a window.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    sent: usize,
    at: Instant,
}

/// What happened in a window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PingFigures {
    /// Requests sent.
    pub sent: u64,
    /// Requests without an answer.
    pub lost: u64,
    /// The longest time between two answers that lies in the window or reaches into it.
    pub longest_gap: Duration,
}

#[derive(Default)]
struct Record {
    /// For each request, by sequence number, whether it was answered.
    answered: Vec<bool>,
    /// When answers came.
    answers: Vec<Instant>,
}

impl PingProbe {
    /// Starts to ping `target` from the namespace.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn start(namespace: &str, target: Ipv4Addr) -> Result<Self> {
        static IDENTIFIER: AtomicU16 = AtomicU16::new(0x6678);
        let identifier = IDENTIFIER.fetch_add(1, Ordering::Relaxed);
        let socket = netns::inside(namespace, || {
            Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).context("cannot make an ICMP socket")
        })?;
        socket.set_read_timeout(Some(Duration::from_millis(100))).context("setting a read time-out")?;
        let receiver = socket.try_clone().context("duplicating the ICMP socket")?;
        let record = Arc::new(Mutex::new(Record::default()));
        let mut workers = Workers::new();
        let shared = Arc::clone(&record);
        workers.start("ping-receive", move |stop| {
            raise_priority();
            while !stop.load(Ordering::Relaxed) {
                receive(&receiver, identifier, &shared);
            }
        })?;
        let shared = Arc::clone(&record);
        workers.start("ping-send", move |stop| {
            raise_priority();
            let mut next = Instant::now();
            while !stop.load(Ordering::Relaxed) {
                send(&socket, target, identifier, &shared);
                next = next_slot(next, Instant::now());
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        })?;
        Ok(Self { record, _workers: workers })
    }

    /// Waits for the first answer.
    ///
    /// # Errors
    /// If none comes within `limit`.
    pub fn wait_answered(&self, limit: Duration) -> Result<()> {
        wait_for("the VM to answer a ping", limit, || {
            Ok((!lock(&self.record).answers.is_empty()).then_some(()))
        })
    }

    /// Marks now.
    pub fn mark(&self) -> Mark {
        Mark { sent: lock(&self.record).answered.len(), at: Instant::now() }
    }

    /// The figures between two marks. Waits until late answers had their time.
    pub fn figures(&self, begin: Mark, end: Mark) -> PingFigures {
        thread::sleep((end.at + GRACE).saturating_duration_since(Instant::now()));
        lock(&self.record).figures(begin, end, Instant::now())
    }
}

impl Record {
    fn figures(&self, begin: Mark, end: Mark, now: Instant) -> PingFigures {
        let window = &self.answered[begin.sent..end.sent];
        let lost = window.iter().filter(|&&answered| !answered).count();
        PingFigures {
            sent: window.len() as u64,
            lost: lost as u64,
            longest_gap: self.longest_gap(begin.at, end.at, now),
        }
    }

    fn longest_gap(&self, begin: Instant, end: Instant, now: Instant) -> Duration {
        let first = self.answers.partition_point(|&at| at < begin);
        let past = self.answers.partition_point(|&at| at <= end);
        // One answer before the window and one after it enclose the gaps that reach into it.
        let before = first.checked_sub(1).map_or(begin, |index| self.answers[index]);
        let after = self.answers.get(past).copied().unwrap_or(now);
        let mut previous = before;
        let mut longest = Duration::ZERO;
        for &at in self.answers[first..past].iter().chain([&after]) {
            longest = longest.max(at.saturating_duration_since(previous));
            previous = at;
        }
        longest
    }
}

/// The next time to send, on the grid; slots that were missed are left out, not made up for in a burst.
fn next_slot(last: Instant, now: Instant) -> Instant {
    let next = last + INTERVAL;
    if next > now { next } else { now }
}

fn send(socket: &Socket, target: Ipv4Addr, identifier: u16, record: &Mutex<Record>) {
    let sequence = {
        let mut record = lock(record);
        record.answered.push(false);
        record.answered.len() - 1
    };
    // What could not be sent stays unanswered, which is what it is for the VM's user.
    let _ = socket.send_to(&request(identifier, sequence as u64), &SocketAddrV4::new(target, 0).into());
}

fn receive(mut socket: &Socket, identifier: u16, record: &Mutex<Record>) {
    let mut packet = [0; 256];
    match socket.read(&mut packet) {
        Ok(len) => {
            let at = Instant::now();
            let Some(sequence) = reply_sequence(&packet[..len], identifier) else { return };
            let mut record = lock(record);
            if let Some(answered) = record.answered.get_mut(sequence)
                && !std::mem::replace(answered, true)
            {
                record.answers.push(at);
            }
        }
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
        // Such as "network is down" while the lab is removed: do not spin.
        Err(_) => thread::sleep(INTERVAL),
    }
}

/// An echo request that carries the whole sequence number, since ICMP's own has 16 bits.
fn request(identifier: u16, sequence: u64) -> [u8; REQUEST_LEN] {
    let mut packet = [0; REQUEST_LEN];
    packet[0] = ECHO_REQUEST;
    packet[4..6].copy_from_slice(&identifier.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes()[6..]);
    packet[8..16].copy_from_slice(&sequence.to_be_bytes());
    let checksum = internet_checksum(&packet);
    packet[2..4].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// The sequence number of an echo reply to us; `packet` starts with the IPv4 header.
fn reply_sequence(packet: &[u8], identifier: u16) -> Option<usize> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let icmp = packet.get(header..)?;
    if icmp.len() < REQUEST_LEN || icmp[0] != ECHO_REPLY || icmp[4..6] != identifier.to_be_bytes() {
        return None;
    }
    let sequence = u64::from_be_bytes(icmp[8..16].try_into().ok()?);
    usize::try_from(sequence).ok()
}

/// RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&b| b.into())).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request as it comes back: behind an IPv4 header, with the reply's type.
    fn reply(identifier: u16, sequence: u64) -> Vec<u8> {
        let mut packet = vec![0x45; 20];
        packet.extend(request(identifier, sequence));
        packet[20] = ECHO_REPLY;
        packet
    }

    #[test]
    fn reply_is_recognised_beyond_16_bits() {
        assert_eq!(reply_sequence(&reply(7, 70_000), 7), Some(70_000));
        assert_eq!(reply_sequence(&reply(8, 1), 7), None);
        assert_eq!(reply_sequence(&reply(7, 1)[..40], 7), None);
        assert_eq!(reply_sequence(&[], 7), None);
    }

    #[test]
    fn checksum_of_a_packet_with_its_checksum_is_zero() {
        assert_eq!(internet_checksum(&request(3, 99)), 0);
    }

    #[test]
    fn figures_are_those_of_the_window() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        // One request per 5 ms; those at 15, 20 and 25 ms are lost; the last answers come after the window.
        let record = Record {
            answered: vec![true, true, true, false, false, false, true, true, true],
            answers: [1, 6, 11, 31, 36, 41].map(at).to_vec(),
        };
        let (begin, end) = (Mark { sent: 1, at: at(5) }, Mark { sent: 7, at: at(33) });
        let figures = record.figures(begin, end, at(1000));
        assert_eq!(figures, PingFigures { sent: 6, lost: 3, longest_gap: Duration::from_millis(20) });
    }

    #[test]
    fn silence_until_now_is_a_gap() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let record = Record { answered: vec![true, false], answers: vec![at(1)] };
        let figures = record.figures(Mark { sent: 0, at: at(0) }, Mark { sent: 2, at: at(10) }, at(1010));
        assert_eq!(figures.longest_gap, Duration::from_millis(1009));
        assert_eq!(figures.lost, 1);
    }

    #[test]
    fn missed_slots_are_left_out() {
        let start = Instant::now();
        assert_eq!(next_slot(start, start), start + INTERVAL);
        let late = start + INTERVAL * 10;
        assert_eq!(next_slot(start, late), late);
    }
}
