//! Which link it becomes.

use crate::{
    agent::{
        AgentError,
        config::{MigrationConfig, TransportChoice},
        patiently,
        port::{Port, WhyUdp},
    },
    migration::MigrationError,
    network::{NetworkError, Transport},
};

/// Takes the NIC as configured. `auto` is AF_XDP where the driver has zero-copy, else UDP sockets, which know why: in copy
/// mode AF_XDP is slower than UDP sockets, whose batches the kernel copies as one (docs/performance.md).
///
/// # Errors
/// What is in the way, with a remedy.
pub(in crate::agent) async fn open_port(config: &MigrationConfig) -> Result<Port, AgentError> {
    let open =
        async |transport, why: Option<WhyUdp>| patiently(|| Port::open(config, transport, why.clone())).await;
    match config.transport {
        TransportChoice::AfXdp => open(Transport::AfXdp, None).await,
        TransportChoice::Udp => open(Transport::Udp, None).await,
        TransportChoice::Auto => match open(Transport::AfXdp, None).await {
            Ok(port) if !port.binding().zero_copy => {
                // Its sockets and its XDP program must be gone first.
                drop(port);
                tracing::info!(
                    interface = config.interface,
                    "{ONLY_COPIES}: UDP sockets are used, which are faster there; `transport = \"af-xdp\"` insists"
                );
                open(Transport::Udp, Some(WhyUdp::Faster(ONLY_COPIES))).await
            }
            Err(error) if denies_af_xdp(&error) => {
                let reason = in_short(&error.to_string());
                tracing::warn!(
                    interface = config.interface,
                    %error,
                    "AF_XDP cannot be had: UDP sockets are used; restart the agent once that is mended"
                );
                open(Transport::Udp, Some(WhyUdp::Denied(reason))).await
            }
            other => other,
        },
    }
}

/// Why `auto` takes UDP sockets though AF_XDP can be had.
const ONLY_COPIES: &str = "the driver has no zero-copy for AF_XDP";

/// Longest reason that goes into status and reports, characters: a verifier can say more than anybody reads.
const LONGEST_REASON: usize = 240;

fn in_short(error: &str) -> String {
    let line = error.lines().next().unwrap_or_default();
    let mut short: String = line.chars().take(LONGEST_REASON).collect();
    if short.len() < error.trim_end().len() {
        short.push('…');
    }
    short
}

/// Whether an error is about AF_XDP or XDP, and nothing that UDP sockets need too.
fn denies_af_xdp(error: &AgentError) -> bool {
    matches!(
        error,
        AgentError::Migration(
            MigrationError::Xsk(_)
                | MigrationError::Network(NetworkError::Occupied(_) | NetworkError::Xdp { .. })
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xsk::XskError;

    #[test]
    fn a_verifier_is_cut_short() {
        assert_eq!(in_short("mig0 already has one"), "mig0 already has one");
        assert_eq!(in_short("verify: rejected\n0: (bf) r6 = r1\n"), "verify: rejected…");
        assert_eq!(in_short(&"ä".repeat(9999)).chars().count(), LONGEST_REASON + 1);
    }

    #[test]
    fn only_what_udp_can_mend_is_fallen_back_from() {
        let xdp = |error: NetworkError| AgentError::Migration(error.into());
        assert!(denies_af_xdp(&xdp(NetworkError::Occupied("mig0".into()))));
        let problem = "Operation not permitted".to_owned();
        assert!(denies_af_xdp(&xdp(NetworkError::Xdp { interface: "mig0".into(), step: "load", problem })));
        let source = rustix::io::Errno::AFNOSUPPORT;
        let system = XskError::System { operation: "creation", interface: "mig0".into(), queue: 0, source };
        assert!(denies_af_xdp(&AgentError::Migration(system.into())));
        assert!(!denies_af_xdp(&xdp(NetworkError::NoCarrier("mig0".into()))));
        assert!(!denies_af_xdp(&xdp(NetworkError::NoInterface("mig0".into()))));
        assert!(!denies_af_xdp(&AgentError::Host("MTU".into())));
    }
}
