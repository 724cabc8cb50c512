//! Questions about a session, each over a connection of its own.

use std::time::Duration;

use crate::{
    agent::{Agent, Peer},
    control::{Channel, ControlError, Item, Message, PROTOCOL},
    migration::{Limits, MigrationError, Verdict},
};

/// Pauses between two attempts to reach a peer: the first, and the longest; each is twice the one before.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Asks the agent at `peer` whose a VM is.
///
/// # Errors
/// When it cannot be reached or has no answer.
async fn ask(agent: &Agent, peer: &Peer, question: Message) -> Result<Verdict, MigrationError> {
    let limits = agent.config.limits;
    let mut channel = agent.security.connect(peer, None, limits).await?;
    let limit = Limits::of(limits.hello);
    channel.send(Item::Message(Message::hello(&agent.config.name))).await?;
    match channel.recv("its hello", limit).await? {
        Item::Message(Message::Hello { protocol: PROTOCOL, name, .. }) => match channel.peer() {
            Some(certified) if !certified.is(&name) => {
                return Err(ControlError::Name { said: name, certified: certified.name.clone() }.into());
            }
            _ => {}
        },
        Item::Message(Message::Hello { protocol, .. }) => {
            return Err(ControlError::Version { ours: PROTOCOL, theirs: protocol }.into());
        }
        other => return Err(MigrationError::unexpected(other.name(), "its hello")),
    }
    channel.send(Item::Message(question)).await?;
    match channel.recv("who has the VM", limit).await? {
        Item::Message(Message::Settled { accepted: true }) => Ok(Verdict::Accepted),
        Item::Message(Message::Settled { accepted: false }) => Ok(Verdict::Refused),
        // It has no answer yet, and says why.
        Item::Message(Message::Abort { reason }) => {
            Err(MigrationError::Peer { host: peer.address.to_string(), reason })
        }
        other => Err(MigrationError::unexpected(other.name(), "who has the VM")),
    }
}

/// Asks until there is an answer. `heard` is told why there is none yet.
pub(in crate::agent) async fn ask_until_answered(
    agent: &Agent,
    peer: &Peer,
    question: Message,
    heard: impl Fn(&MigrationError),
) -> Verdict {
    let mut pause = RETRY.0;
    loop {
        match ask(agent, peer, question.clone()).await {
            Ok(verdict) => return verdict,
            Err(error) => {
                tracing::info!(peer = %peer.address, %error, "cannot settle yet");
                heard(&error);
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}
