//! The TLS handshake, and its failures in words.
//!
//! TLS 1.3 (RFC 8446), both ends with certificates. A client is done before the server has looked at the client's
//! certificate: a refusal then comes as an alert in place of the first message, which [`ControlError`] tells apart.

use std::{io, time::Duration};

use rustls::{
    AlertDescription, CertificateError, CommonState,
    pki_types::{CertificateDer, ServerName},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::{ControlError, ControlStream};
use crate::pki::{ALPN, Certified, Identity};

const AWAITED: &str = "its part of the TLS handshake";
/// What a refused client has sent already is read, so that it gets to hear why (a reset would overtake the alert): for
/// that long, and so many bytes at most.
const DRAIN: (Duration, u64) = (Duration::from_secs(1), 64 << 10);

/// Proves both ends of a connection to host `peer`, within `limit`.
///
/// # Errors
/// [`ControlError`]: no TLS there, or a certificate that is not `peer`'s.
pub async fn secure_to<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    identity: &Identity,
    peer: &str,
    limit: Duration,
) -> Result<ControlStream<S>, ControlError> {
    let name = ServerName::try_from(peer.to_owned()).map_err(|_| {
        ControlError::Peer(format!(
            "there can be no certificate for {peer:?}: give the host a name as in DNS"
        ))
    })?;
    let handshake = TlsConnector::from(identity.client()).connect(name, stream);
    let stream = tokio::time::timeout(limit, handshake)
        .await
        .map_err(|_| ControlError::Timeout { awaited: AWAITED, limit })?
        .map_err(handshake_failed)?;
    let peer = certified(stream.get_ref().1)?;
    Ok(ControlStream::Tls { stream: Box::new(TlsStream::Client(stream)), peer })
}

/// Proves both ends of a connection that somebody opened, within `limit`. Who it is says the stream.
///
/// # Errors
/// [`ControlError`]: it speaks no TLS, or has no certificate of the CA.
pub async fn secure_from<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    identity: &Identity,
    limit: Duration,
) -> Result<ControlStream<S>, ControlError> {
    let handshake = TlsAcceptor::from(identity.server()).accept(stream).into_fallible();
    let accepted = tokio::time::timeout(limit, handshake)
        .await
        .map_err(|_| ControlError::Timeout { awaited: AWAITED, limit })?;
    let stream = match accepted {
        Ok(stream) => stream,
        Err((error, mut stream)) => {
            let drain = async {
                stream.shutdown().await?;
                tokio::io::copy(&mut (&mut stream).take(DRAIN.1), &mut tokio::io::sink()).await
            };
            // It is told or not; the reason is the same.
            let _ = tokio::time::timeout(DRAIN.0, drain).await;
            return Err(handshake_failed(error));
        }
    };
    let peer = certified(stream.get_ref().1)?;
    Ok(ControlStream::Tls { stream: Box::new(TlsStream::Server(stream)), peer })
}

fn certified(session: &CommonState) -> Result<Certified, ControlError> {
    if session.alpn_protocol() != Some(ALPN) {
        return Err(ControlError::Tls("the other end does not say that it means xferry (ALPN)".into()));
    }
    let leaf: Option<&CertificateDer<'_>> = session.peer_certificates().and_then(|chain| chain.first());
    let leaf = leaf.ok_or_else(|| ControlError::Peer("it has shown none".into()))?;
    Certified::read(leaf).map_err(ControlError::Peer)
}

fn handshake_failed(error: io::Error) -> ControlError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => ControlError::Tls(
            "the other agent hung up in it (is it another program, or does it have too many connections?)"
                .into(),
        ),
        _ => error.into(),
    }
}

/// What a failure of the TLS layer means, if it is one.
pub(super) fn explained(error: &io::Error) -> Option<ControlError> {
    use rustls::Error;
    let error = error.get_ref()?.downcast_ref::<Error>()?;
    Some(match error {
        Error::InvalidMessage(_) => ControlError::PeerPlain,
        Error::InvalidCertificate(problem) => ControlError::Peer(certificate_problem(problem)),
        Error::NoCertificatesPresented => ControlError::Peer("it has shown none".into()),
        Error::AlertReceived(alert) => alert_received(*alert),
        other => ControlError::Tls(other.to_string()),
    })
}

fn certificate_problem(problem: &CertificateError) -> String {
    match problem {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "it has expired: issue a new one, or set the clocks".into()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet: set the clocks".into()
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "it is issued by another CA than the one in this host's ca.pem: issue both hosts' by the same"
                .into()
        }
        CertificateError::Revoked => {
            "it is on the list of revoked certificates (crl.pem) of this host: issue the other one a new certificate if it is \
             to be trusted again"
                .into()
        }
        CertificateError::NotValidForNameContext { expected, presented } => format!(
            "it is not one for {} but for {}: correct [peers] here, or the other host's certificate",
            expected.to_str(),
            // As `DnsName("host-b")`.
            presented
                .iter()
                .map(|name| name.trim_start_matches("DnsName(").trim_end_matches(')').replace('"', ""))
                .collect::<Vec<_>>()
                .join(", ")
        ),
        other => other.to_string(),
    }
}

fn alert_received(alert: AlertDescription) -> ControlError {
    ControlError::Own(match alert {
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "it is issued by another CA than the one in the other host's ca.pem: issue both hosts' by the same".into()
        }
        AlertDescription::CertificateExpired => {
            "it has expired, or is not valid yet by the other host's clock: issue a new one, or set the clocks"
                .into()
        }
        AlertDescription::CertificateRevoked => {
            "it is on the other host's list of revoked certificates (crl.pem): issue a new one if this host is to be trusted again"
                .into()
        }
        AlertDescription::CertificateRequired => "it wants one".into(),
        AlertDescription::BadCertificate => {
            "the other agent expected another host here: its [peers] and this host's certificate must agree".into()
        }
        AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::AccessDenied => format!("TLS alert {alert:?}"),
        other => return ControlError::Tls(format!("the other agent broke it off, TLS alert {other:?}")),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bytes::Bytes;
    use time::{Duration as Span, OffsetDateTime};
    use tokio::io::DuplexStream;

    use super::*;
    use crate::{
        control::{Channel, Item, Message, StreamChannel, split},
        pki::{self, Validity},
    };

    const LIMIT: Duration = Duration::from_secs(5);
    type Secured = Result<StreamChannel<ControlStream<DuplexStream>>, ControlError>;

    /// A CA with a name that others have too.
    fn ca() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), "CA", Validity::from_now(50), false).unwrap();
        dir
    }

    fn valid(ca: &Path, host: &str, validity: Validity) -> Identity {
        let out = ca.join(host);
        pki::issue(ca, host, &out, validity, false).unwrap();
        Identity::load(&out, host).unwrap()
    }

    fn identity(ca: &Path, host: &str) -> Identity {
        valid(ca, host, Validity::from_now(40))
    }

    /// What each side says of the other after a word in each direction, the client first, as agents do.
    async fn meet(client: &Identity, expected: &str, server: &Identity) -> (Secured, Secured) {
        let (a, b) = tokio::io::duplex(4096);
        let word = |n| Item::Message(Message::Probed { frames: n });
        let calling = async {
            let mut channel = split(secure_to(a, client, expected, LIMIT).await?);
            channel.send(word(1)).await?;
            channel.recv("a word", LIMIT).await?;
            Ok(channel)
        };
        let called = async {
            let mut channel = split(secure_from(b, server, LIMIT).await?);
            channel.recv("a word", LIMIT).await?;
            channel.send(word(2)).await?;
            Ok(channel)
        };
        tokio::join!(calling, called)
    }

    fn says(result: Secured, words: &[&str]) {
        let error = result.err().unwrap().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
    }

    #[tokio::test]
    async fn both_ends_are_proved_and_share_a_secret() {
        let ca = ca();
        let (a, b) = (identity(ca.path(), "host-a"), identity(ca.path(), "host-b"));
        let (client, server) = meet(&a, "host-b", &b).await;
        let (mut client, mut server) = (client.unwrap(), server.unwrap());
        assert!(client.peer().unwrap().is("host-b") && server.peer().unwrap().is("host-a"));
        let ControlStream::Tls { stream, .. } = client.stream() else { panic!("there is TLS") };
        let group = stream.get_ref().1.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(group, rustls::NamedGroup::X25519MLKEM768, "what is recorded today stays closed");
        // Two have the same secret when one proves what the other says.
        let secret = |end: &StreamChannel<ControlStream<_>>| end.page_secret().unwrap().unwrap();
        let code = secret(&client).feedback_key(7).unwrap().code(b"said");
        let proves = |end, session| secret(end).feedback_key(session).unwrap().proves(b"said", &code);
        assert!(proves(&server, 7));
        assert!(!proves(&server, 8), "another for each session");
        let (again, _) = meet(&a, "host-b", &b).await;
        assert!(!proves(&again.unwrap(), 7), "another for each connection");
        let state = Item::State(Bytes::from(vec![9; 400_000]));
        let sent = state.clone();
        let (sent, came) = tokio::join!(client.send(sent), server.recv("state", LIMIT));
        sent.unwrap();
        assert_eq!(came.unwrap(), state);
        let plain = split(ControlStream::Plain(tokio::io::duplex(1).0));
        assert!(plain.peer().is_none() && plain.page_secret().unwrap().is_none());
    }

    #[tokio::test]
    async fn the_same_name_of_another_ca_is_a_stranger() {
        let (ours, theirs) = (ca(), ca());
        let (a, b) = (identity(ours.path(), "host-a"), identity(theirs.path(), "host-b"));
        let (client, server) = meet(&a, "host-b", &b).await;
        says(client, &["certificate", "another CA", "this host's ca.pem"]);
        says(server, &["another CA", "other host's ca.pem"]);
        // A server that anybody would believe, and a client that nobody should.
        let mixed = theirs.path().join("mixed");
        pki::issue(theirs.path(), "host-c", &mixed, Validity::from_now(5), false).unwrap();
        let both =
            [ours.path().join("ca.pem"), mixed.join("ca.pem")].map(|path| std::fs::read(path).unwrap());
        std::fs::write(mixed.join("ca.pem"), both.concat()).unwrap();
        let stranger = Identity::load(&mixed, "host-c").unwrap();
        let (client, server) = meet(&stranger, "host-a", &a).await;
        says(client, &["does not accept this host's certificate", "another CA"]);
        says(server, &["certificate", "another CA", "this host's ca.pem"]);
    }

    #[tokio::test]
    async fn expired_certificates_are_refused_on_either_side() {
        let ca = ca();
        let now = OffsetDateTime::now_utc();
        let over = Validity { from: now - Span::days(9), until: now - Span::days(1) };
        let (old, b) = (valid(ca.path(), "host-a", over), identity(ca.path(), "host-b"));
        let (client, server) = meet(&old, "host-b", &b).await;
        says(client, &["this host's certificate", "expired"]);
        says(server, &["certificate", "expired", "issue a new one"]);
        let (client, server) = meet(&b, "host-a", &old).await;
        says(client, &["certificate", "expired"]);
        says(server, &["this host's certificate", "expired"]);
        let soon = Validity { from: now + Span::days(1), until: now + Span::days(2) };
        let (client, _) = meet(&b, "host-c", &valid(ca.path(), "host-c", soon)).await;
        says(client, &["not valid yet", "clocks"]);
    }

    #[tokio::test]
    async fn revoked_certificates_are_refused_on_either_side() {
        let ca = ca();
        let (a, b) = (identity(ca.path(), "host-a"), identity(ca.path(), "host-b"));
        let list = pki::revoke(ca.path(), "host-b").unwrap().path;
        // Where nobody has brought the list, nothing has changed.
        let (client, server) = meet(&a, "host-b", &b).await;
        assert!(client.is_ok() && server.is_ok());
        let dir = ca.path().join("host-a");
        std::fs::copy(&list, dir.join("crl.pem")).unwrap();
        let a = Identity::load(&dir, "host-a").unwrap();
        assert_eq!((a.revoked(), a.is_revoked()), (1, false));
        let (client, server) = meet(&a, "host-b", &b).await;
        says(client, &["certificate", "list of revoked", "this host"]);
        says(server, &["this host's certificate", "other host's list of revoked"]);
        let (client, server) = meet(&b, "host-a", &a).await;
        says(client, &["this host's certificate", "other host's list of revoked"]);
        says(server, &["certificate", "list of revoked", "this host"]);
        // Others are as good as before, and so is a new one; its files bring the list along.
        let c = identity(ca.path(), "host-c");
        assert_eq!(c.revoked(), 1);
        let (client, server) = meet(&c, "host-a", &a).await;
        assert!(client.is_ok() && server.is_ok());
        pki::issue(ca.path(), "host-b", &ca.path().join("host-b"), Validity::from_now(9), true).unwrap();
        let renewed = Identity::load(&ca.path().join("host-b"), "host-b").unwrap();
        let (client, server) = meet(&a, "host-b", &renewed).await;
        assert!(client.is_ok() && server.is_ok());
    }

    #[tokio::test]
    async fn another_host_of_the_same_ca_is_not_the_one() {
        let ca = ca();
        let (a, c) = (identity(ca.path(), "host-a"), identity(ca.path(), "host-c"));
        let (client, server) = meet(&a, "host-b", &c).await;
        says(client, &["not one for host-b but for host-c", "[peers]"]);
        says(server, &["expected another host", "[peers]"]);
        let (client, _) = meet(&a, "host b", &c).await;
        says(client, &["\"host b\"", "DNS"]);
    }

    #[tokio::test]
    async fn a_client_without_a_certificate_is_refused() {
        let ca = ca();
        let b = identity(ca.path(), "host-b");
        let mut roots = rustls::RootCertStore::empty();
        let pem = std::fs::read(ca.path().join("ca.pem")).unwrap();
        roots.add(rustls::pki_types::pem::PemObject::from_pem_slice(&pem).unwrap()).unwrap();
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let (near, far) = tokio::io::duplex(4096);
        let calling = async {
            let name = ServerName::try_from("host-b").unwrap();
            let mut stream =
                TlsConnector::from(std::sync::Arc::new(config)).connect(name, near).await.unwrap();
            explained(&stream.read_u8().await.unwrap_err()).unwrap().to_string()
        };
        let (client, server) = tokio::join!(calling, secure_from(far, &b, LIMIT));
        assert!(client.contains("it wants one"), "{client}");
        let error = server.err().unwrap().to_string();
        assert!(error.contains("it has shown none"), "{error}");
    }

    #[tokio::test]
    async fn plain_and_tls_refuse_each_other_at_once() {
        let ca = ca();
        let a = identity(ca.path(), "host-a");
        let hello = || Item::Message(Message::hello("host-b"));
        // A plain client at a TLS server.
        let (near, far) = tokio::io::duplex(4096);
        let calling = async {
            let mut channel = split(ControlStream::Plain(near));
            channel.send(hello()).await.unwrap();
            channel.recv("its hello", LIMIT).await.unwrap_err()
        };
        let (client, server) = tokio::join!(calling, secure_from(far, &a, LIMIT));
        assert!(matches!(client, ControlError::PeerTls), "{client}");
        assert!(matches!(server.err().unwrap(), ControlError::PeerPlain));
        assert!(client.to_string().contains("insecure = true"), "{client}");
        // A TLS client at a plain server.
        let (near, far) = tokio::io::duplex(4096);
        let called = async {
            let mut channel = split(ControlStream::Plain(far));
            let error = channel.recv("its hello", LIMIT).await.unwrap_err();
            channel.send(Item::Message(Message::Abort { reason: error.to_string() })).await.unwrap();
            error
        };
        let (client, server) = tokio::join!(secure_to(near, &a, "host-b", LIMIT), called);
        assert!(matches!(client.err().unwrap(), ControlError::PeerPlain));
        assert!(matches!(server, ControlError::PeerTls), "{server}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_that_stops_has_a_limit() {
        let ca = ca();
        let b = identity(ca.path(), "host-b");
        // The head of a ClientHello that never goes on.
        let words: [&[u8]; 3] = [b"", &[0x16], &[0x16, 3, 1, 1, 0, 1, 0, 0, 0xfc, 3, 3]];
        for word in words {
            let (mut near, far) = tokio::io::duplex(4096);
            near.write_all(word).await.unwrap();
            let error = secure_from(far, &b, LIMIT).await.err().unwrap().to_string();
            assert!(error.contains("TLS handshake within 5 s"), "{error}");
            let (mut near, far) = tokio::io::duplex(4096);
            near.write_all(word).await.unwrap();
            near.shutdown().await.unwrap();
            let error = secure_from(far, &b, LIMIT).await.err().unwrap().to_string();
            assert!(error.contains("hung up"), "{error}");
        }
        let (near, _far) = tokio::io::duplex(4096);
        let error = secure_to(near, &b, "host-a", LIMIT).await.err().unwrap().to_string();
        assert!(error.contains("TLS handshake within 5 s"), "{error}");
    }
}
