//! Messages over a byte stream.

use std::{future::Future, io::ErrorKind, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{ControlError, Message};

/// Longest message taken, bytes. The longest real one lists the losses of a round: 16 bytes of text a range.
pub const MAX_MESSAGE: usize = 16 << 20;
/// Longest first message taken, bytes: nobody knows yet who says it.
const MAX_FIRST: usize = 4096;
/// First bytes of a TLS record with a handshake or an alert (RFC 8446, section 5.1).
const TLS_RECORDS: [[u8; 2]; 2] = [[0x16, 3], [0x15, 3]];
/// Type byte of a JSON message. 0 is reserved.
const JSON: u8 = 1;
/// Type byte of device state.
const STATE: u8 = 2;

/// What can be received.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// A message.
    Message(Message),
    /// A part of the device state.
    State(Bytes),
}

impl Item {
    /// Name for error messages.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Message(message) => message.name(),
            Self::State(_) => "device state",
        }
    }
}

/// One end of a control channel, as the state machines see it.
pub trait Channel: Send {
    /// Sends one item.
    fn send(&mut self, item: Item) -> impl Future<Output = Result<(), ControlError>> + Send;
    /// The next item; `awaited` and `limit` are for the error when it does not come in time. Cancel-safe: an item
    /// that was not returned is returned by the next call.
    fn recv(
        &mut self,
        awaited: &'static str,
        limit: Duration,
    ) -> impl Future<Output = Result<Item, ControlError>> + Send;
}

/// A byte stream as channel.
pub struct StreamChannel<S> {
    stream: S,
    received: BytesMut,
    /// Longest item taken, bytes.
    limit: usize,
}

/// Wraps a stream.
pub fn split<S: AsyncRead + AsyncWrite + Unpin + Send>(stream: S) -> StreamChannel<S> {
    StreamChannel { stream, received: BytesMut::new(), limit: MAX_FIRST }
}

impl<S> StreamChannel<S> {
    /// What it runs over.
    pub const fn stream(&self) -> &S {
        &self.stream
    }
}

fn encode(item: &Item) -> Result<Bytes, ControlError> {
    let malformed = |error: serde_json::Error| ControlError::Malformed(error.to_string());
    let json;
    let (kind, body) = match item {
        Item::Message(message) => {
            json = serde_json::to_vec(message).map_err(malformed)?;
            (JSON, json.as_slice())
        }
        Item::State(bytes) => (STATE, bytes.as_ref()),
    };
    // The other side would not take it: better said here.
    if body.len() >= MAX_MESSAGE {
        return Err(ControlError::Malformed(format!(
            "a message of {} bytes is longer than {MAX_MESSAGE}",
            body.len()
        )));
    }
    let mut out = BytesMut::with_capacity(body.len() + 5);
    out.put_u32(body.len() as u32 + 1);
    out.put_u8(kind);
    out.put_slice(body);
    Ok(out.freeze())
}

/// Takes one item of at most `limit` bytes off the front of `buffer`, if it is there whole.
///
/// # Errors
/// [`ControlError::Malformed`] or [`ControlError::PeerTls`]; the stream cannot be used after it.
pub fn decode(buffer: &mut BytesMut, limit: usize) -> Result<Option<Item>, ControlError> {
    let Some(length) = buffer.first_chunk::<4>() else { return Ok(None) };
    // No item is that long, so nothing else can be meant.
    if TLS_RECORDS.contains(&[length[0], length[1]]) {
        return Err(ControlError::PeerTls);
    }
    let length = u32::from_be_bytes(*length) as usize;
    if length == 0 || length > limit {
        return Err(ControlError::Malformed(format!(
            "a length of {length} bytes is not between 1 and {limit}"
        )));
    }
    if buffer.len() < 4 + length {
        return Ok(None);
    }
    buffer.advance(4);
    let mut body = buffer.split_to(length).freeze();
    match body.get_u8() {
        JSON => {
            let message: Message =
                serde_json::from_slice(&body).map_err(|error| ControlError::Malformed(error.to_string()))?;
            message.check().map_err(ControlError::Malformed)?;
            Ok(Some(Item::Message(message)))
        }
        STATE => Ok(Some(Item::State(body))),
        other => Err(ControlError::Malformed(format!("unknown type {other}"))),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Channel for StreamChannel<S> {
    async fn send(&mut self, item: Item) -> Result<(), ControlError> {
        self.stream.write_all(&encode(&item)?).await?;
        self.stream.flush().await?;
        Ok(())
    }

    async fn recv(&mut self, awaited: &'static str, limit: Duration) -> Result<Item, ControlError> {
        let receive = async {
            loop {
                if let Some(item) = decode(&mut self.received, self.limit)? {
                    self.limit = MAX_MESSAGE;
                    return Ok(item);
                }
                match self.stream.read_buf(&mut self.received).await {
                    Ok(0) => return Err(ControlError::Closed),
                    // TLS without its last word. Each item says how long it is, so nothing is cut short unseen.
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                        return Err(ControlError::Closed);
                    }
                    read => read?,
                };
            }
        };
        tokio::time::timeout(limit, receive).await.map_err(|_| ControlError::Timeout { awaited, limit })?
    }
}

#[cfg(test)]
mod tests {
    use super::{super::arbitrary::messages, *};
    use proptest::prelude::*;

    /// Miri is slow.
    const LIMIT: Duration = Duration::from_secs(if cfg!(miri) { 600 } else { 1 });

    #[tokio::test]
    async fn items_cross_in_order() {
        let (a, b) = tokio::io::duplex(64);
        let (mut a, mut b) = (split(a), split(b));
        let sent = [
            Item::Message(Message::Probed { frames: 3 }),
            Item::State(Bytes::from(vec![7; 5000])),
            Item::Message(Message::Done),
        ];
        let items = sent.clone();
        tokio::spawn(async move {
            for item in items {
                a.send(item).await.unwrap();
            }
        });
        for item in sent {
            assert_eq!(b.recv("it", LIMIT).await.unwrap(), item);
        }
        assert!(matches!(b.recv("more", LIMIT).await, Err(ControlError::Closed)));
    }

    #[tokio::test]
    async fn silence_has_a_limit() {
        let (a, _b) = tokio::io::duplex(64);
        let error = split(a).recv("its hello", Duration::from_millis(10)).await.unwrap_err();
        assert!(error.to_string().contains("did not send its hello"), "{error}");
    }

    #[test]
    fn lengths_are_checked_before_memory_is_taken() {
        for length in [0u32, MAX_MESSAGE as u32 + 1, u32::MAX] {
            let mut buffer = BytesMut::from(&length.to_be_bytes()[..]);
            assert!(matches!(decode(&mut buffer, MAX_MESSAGE), Err(ControlError::Malformed(_))), "{length}");
        }
    }

    #[tokio::test]
    async fn a_stranger_is_not_listened_to_for_long() {
        let (mut a, b) = tokio::io::duplex(64);
        let mut b = split(b);
        a.write_all(&(MAX_FIRST as u32 + 1).to_be_bytes()).await.unwrap();
        assert!(matches!(b.recv("its hello", LIMIT).await, Err(ControlError::Malformed(_))));
    }

    #[test]
    fn tls_is_told_from_nonsense() {
        for record in [[0x16, 3, 1, 2, 0, 1], [0x15, 3, 3, 0, 2, 2]] {
            let mut buffer = BytesMut::from(&record[..]);
            assert!(matches!(decode(&mut buffer, MAX_MESSAGE), Err(ControlError::PeerTls)));
        }
    }

    #[tokio::test]
    async fn a_stranger_gets_no_memory_before_its_hello() {
        let (mut a, b) = tokio::io::duplex(1 << 16);
        a.write_all(&(MAX_FIRST as u32 + 1).to_be_bytes()).await.unwrap();
        let mut b = split(b);
        assert!(matches!(b.recv("its hello", LIMIT).await, Err(ControlError::Malformed(_))));
        assert!(b.received.capacity() <= 2 * MAX_FIRST);
    }

    #[tokio::test]
    async fn longer_items_may_follow_the_first() {
        let (a, b) = tokio::io::duplex(1 << 16);
        let (mut a, mut b) = (split(a), split(b));
        let long = Item::State(Bytes::from(vec![1; 1 << 20]));
        let sent = long.clone();
        tokio::spawn(async move {
            a.send(Item::Message(Message::hello("a"))).await.unwrap();
            a.send(sent).await.unwrap();
        });
        assert!(matches!(b.recv("its hello", LIMIT).await, Ok(Item::Message(Message::Hello { .. }))));
        assert_eq!(b.recv("state", LIMIT).await.unwrap(), long);
    }

    #[test]
    fn nothing_is_sent_that_would_not_be_taken() {
        let encoded = |len: usize| encode(&Item::State(Bytes::from(vec![0; len])));
        assert!(encoded(MAX_MESSAGE).is_err());
        let mut buffer = BytesMut::from(&encoded(MAX_MESSAGE - 1).unwrap()[..]);
        assert!(matches!(decode(&mut buffer, MAX_MESSAGE), Ok(Some(Item::State(_)))));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_as_it_is_read() {
        let body =
            br#"{"type":"round-closed","epoch":1,"losses":[{"lane":0,"missing":[[9,3]]}],"queues":[]}"#;
        let mut buffer = BytesMut::new();
        buffer.put_u32(body.len() as u32 + 1);
        buffer.put_u8(JSON);
        buffer.put_slice(body);
        let error = decode(&mut buffer, MAX_MESSAGE).unwrap_err().to_string();
        assert!(error.contains("round-closed") && error.contains("9..3"), "{error}");
    }

    #[test]
    fn every_message_comes_out_as_it_went_in() {
        for message in crate::fuzzing::seeds::every_message() {
            let item = Item::Message(message);
            let mut buffer = BytesMut::from(&encode(&item).unwrap()[..]);
            assert_eq!(decode(&mut buffer, MAX_MESSAGE).unwrap(), Some(item));
            assert!(buffer.is_empty());
        }
    }

    #[test]
    fn unknown_types_and_messages_are_refused() {
        let mut buffer = BytesMut::from(&[0, 0, 0, 1, 9][..]);
        assert!(matches!(decode(&mut buffer, MAX_MESSAGE), Err(ControlError::Malformed(_))));
        let body = br#"{"type":"dance"}"#;
        let mut buffer = BytesMut::new();
        buffer.put_u32(body.len() as u32 + 1);
        buffer.put_u8(JSON);
        buffer.put_slice(body);
        assert!(matches!(decode(&mut buffer, MAX_MESSAGE), Err(ControlError::Malformed(_))));
    }

    proptest! {
        #![proptest_config(crate::fuzzing::at_most(64))]

        /// However the network cuts the stream, the same items come out.
        #[test]
        fn items_survive_any_cut(sent in proptest::collection::vec(prop_oneof![
            messages().prop_map(Item::Message),
            proptest::collection::vec(any::<u8>(), 0..200).prop_map(|bytes| Item::State(bytes.into())),
        ], 1..5), cut in 1usize..50) {
            let stream: Vec<u8> = sent.iter().flat_map(|item| encode(item).unwrap().to_vec()).collect();
            let (mut buffer, mut got) = (BytesMut::new(), Vec::new());
            for part in stream.chunks(cut) {
                buffer.extend_from_slice(part);
                while let Some(item) = decode(&mut buffer, MAX_MESSAGE).unwrap() {
                    got.push(item);
                }
            }
            prop_assert_eq!(got, sent);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode(&mut buffer, MAX_MESSAGE) {}
        }
    }
}
