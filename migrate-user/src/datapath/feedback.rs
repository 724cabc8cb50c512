//! What the receiver tells the sender while a round runs: how far it got. Lossy on purpose; every datagram
//! says all, so the next one heals a lost one.

use std::{io, net::UdpSocket, sync::Arc, time::Duration};

use super::protection::{CODE_LEN, FeedbackKey};

/// Length of a datagram without the code that proves it, bytes.
pub const FEEDBACK_LEN: usize = 28;

const MAGIC: [u8; 4] = *b"XFBK";

/// Datagrams that are no feedback, after which a lane goes on with its work: a stranger must not keep it from that.
const STRANGERS: u32 = 32;

/// Progress of one lane in one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feedback {
    /// The migration.
    pub session: u64,
    /// The epoch.
    pub epoch: u32,
    /// The lane.
    pub lane: u16,
    /// One past the highest frame number seen.
    pub seen: u32,
    /// Frames that came; the rest of `seen` is lost or late.
    pub received: u32,
}

impl Feedback {
    /// The datagram: magic, lane, 2 zero bytes, session, epoch, seen, received; little-endian.
    pub fn to_bytes(&self) -> [u8; FEEDBACK_LEN] {
        let mut out = [0; FEEDBACK_LEN];
        out[0..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&self.lane.to_le_bytes());
        out[8..16].copy_from_slice(&self.session.to_le_bytes());
        out[16..20].copy_from_slice(&self.epoch.to_le_bytes());
        out[20..24].copy_from_slice(&self.seen.to_le_bytes());
        out[24..28].copy_from_slice(&self.received.to_le_bytes());
        out
    }

    /// Reads a datagram; `None` when it is not one of ours.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; FEEDBACK_LEN] = bytes.try_into().ok()?;
        if bytes[0..4] != MAGIC || bytes[6..8] != [0, 0] {
            return None;
        }
        let le32 = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Some(Self {
            session: u64::from(le32(8)) | u64::from(le32(12)) << 32,
            epoch: le32(16),
            lane: u16::from_le_bytes([bytes[4], bytes[5]]),
            seen: le32(20),
            received: le32(24),
        })
    }
}

/// Where a receiver sends its feedback.
pub trait FeedbackTx: Send + Sync {
    /// Sends, or loses it: never waits.
    fn send(&self, feedback: Feedback);
}

/// Where a sender hears feedback.
pub trait FeedbackRx: Send {
    /// The next one, waiting at most `wait`.
    fn recv(&mut self, wait: Duration) -> Option<Feedback>;
}

/// A UDP socket for one lane's feedback. With a key, datagrams carry a code that proves them, and others are not heard.
pub struct FeedbackSocket {
    socket: UdpSocket,
    key: Option<Arc<FeedbackKey>>,
}

impl FeedbackSocket {
    /// Over a socket that does not block; one that tells is connected.
    pub fn new(socket: UdpSocket, key: Option<Arc<FeedbackKey>>) -> Self {
        Self { socket, key }
    }

    fn read(&self, datagram: &[u8]) -> Option<Feedback> {
        let Some(key) = &self.key else { return Feedback::parse(datagram) };
        let (feedback, code) = datagram.split_last_chunk::<CODE_LEN>()?;
        if key.proves(feedback, code) { Feedback::parse(feedback) } else { None }
    }
}

impl FeedbackTx for FeedbackSocket {
    fn send(&self, feedback: Feedback) {
        let mut datagram = [0; FEEDBACK_LEN + CODE_LEN];
        let (bytes, code) = datagram.split_at_mut(FEEDBACK_LEN);
        bytes.copy_from_slice(&feedback.to_bytes());
        let len = match &self.key {
            Some(key) => {
                code.copy_from_slice(&key.code(bytes));
                FEEDBACK_LEN + CODE_LEN
            }
            None => FEEDBACK_LEN,
        };
        // A lost datagram is healed by the next; a connection that is gone shows in the control channel.
        let _ = self.socket.send(&datagram[..len]);
    }
}

impl FeedbackRx for FeedbackSocket {
    fn recv(&mut self, wait: Duration) -> Option<Feedback> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut bytes = [0; FEEDBACK_LEN + CODE_LEN + 1];
        let mut strangers = 0;
        loop {
            match self.socket.recv(&mut bytes) {
                Ok(len) => match self.read(&bytes[..len]) {
                    Some(feedback) => return Some(feedback),
                    None if strangers < STRANGERS => strangers += 1,
                    None => return None,
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !wait.is_zero() => {
                    let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(wait.subsec_nanos()) };
                    let ready = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout));
                    if !matches!(ready, Ok(1..)) {
                        return None;
                    }
                }
                // Nothing there, or an ICMP error of an earlier send: there is no feedback now.
                Err(_) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn survives_the_wire_and_refuses_strangers() {
        let feedback = Feedback { session: 0x0123_4567_89ab_cdef, epoch: 7, lane: 3, seen: 99, received: 98 };
        let bytes = feedback.to_bytes();
        assert_eq!(Feedback::parse(&bytes), Some(feedback));
        assert_eq!(Feedback::parse(&bytes[1..]), None);
        assert_eq!(Feedback::parse(&[bytes.as_slice(), &[0]].concat()), None);
        let mut other = bytes;
        other[0] = b'Y';
        assert_eq!(Feedback::parse(&other), None);
    }

    #[test]
    fn with_a_key_only_who_has_it_is_heard() {
        let secret = |byte| super::super::Secret::new([byte; 32]);
        let key = |byte, session| Some(Arc::new(secret(byte).feedback_key(session).unwrap()));
        let hears = |told: Option<Arc<FeedbackKey>>, hearing: Option<Arc<FeedbackKey>>| {
            let there = UdpSocket::bind("127.0.0.1:0").unwrap();
            there.set_nonblocking(true).unwrap();
            let here = UdpSocket::bind("127.0.0.1:0").unwrap();
            here.connect(there.local_addr().unwrap()).unwrap();
            let feedback = Feedback { session: 7, epoch: 1, lane: 0, seen: 2, received: 1 };
            FeedbackSocket::new(here, told).send(feedback);
            let heard = FeedbackSocket::new(there, hearing).recv(Duration::from_millis(50));
            assert!(heard.is_none_or(|heard| heard == feedback));
            heard.is_some()
        };
        assert!(hears(None, None) && hears(key(1, 7), key(1, 7)));
        assert!(!hears(key(2, 7), key(1, 7)), "another secret");
        assert!(!hears(key(1, 8), key(1, 7)), "another session");
        assert!(!hears(None, key(1, 7)), "no code");
        assert!(!hears(key(1, 7), None), "a code where none is known");
    }

    #[test]
    fn a_flood_keeps_nobody_from_its_work() {
        let here = UdpSocket::bind("127.0.0.1:0").unwrap();
        here.set_nonblocking(true).unwrap();
        let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
        stranger.connect(here.local_addr().unwrap()).unwrap();
        for _ in 0..2 * STRANGERS {
            stranger.send(b"what nobody asked for").unwrap();
        }
        let feedback = Feedback { session: 7, epoch: 1, lane: 0, seen: 2, received: 1 };
        stranger.send(&feedback.to_bytes()).unwrap();
        let mut here = FeedbackSocket::new(here, None);
        assert_eq!(here.recv(Duration::ZERO), None, "not all of them at once");
        assert_eq!(here.recv(Duration::ZERO), Some(feedback));
    }

    proptest! {
        #[test]
        fn comes_out_as_it_went_in(session: u64, epoch: u32, lane: u16, seen: u32, received: u32) {
            let feedback = Feedback { session, epoch, lane, seen, received };
            prop_assert_eq!(Feedback::parse(&feedback.to_bytes()), Some(feedback));
        }
    }
}
