//! The channels of a NIC: its queues, each with an interrupt of its own, as ethtool(8) `-l` and `-L` know them.
//!
//! Asked for and set by the kernel's ethtool interface (Documentation/networking/ethtool-netlink.rst, CHANNELS_GET and
//! CHANNELS_SET).

use std::{
    path::Path,
    time::{Duration, Instant},
};

use ethtool::{EthtoolAttr, EthtoolChannelAttr, EthtoolError};
use futures_util::{StreamExt, TryStreamExt};

use super::NetworkError;

/// How long a NIC may take until it has its link again: most drivers start anew when their channels change.
const CARRIER_LIMIT: Duration = Duration::from_secs(10);
/// How often that is looked at.
const CARRIER_INTERVAL: Duration = Duration::from_millis(20);

/// A NIC that was given other channels than it had.
#[derive(Debug)]
pub struct ChangedChannels {
    interface: String,
    before: Setting,
}

impl ChangedChannels {
    /// Gives `interface` so many channels, and waits until it has its link again. `None` when it has them already.
    ///
    /// # Errors
    /// [`NetworkError::Channels`]: what it offers, or what its driver says.
    pub async fn set(interface: &str, wanted: u32) -> Result<Option<Self>, NetworkError> {
        let failed = |problem| NetworkError::Channels { interface: interface.to_owned(), wanted, problem };
        let offer = read(interface).await.map_err(failed)?;
        let setting = offer.setting(wanted).map_err(failed)?;
        let before = offer.now();
        if setting == before {
            return Ok(None);
        }
        write(interface, setting).await.map_err(failed)?;
        Ok(Some(Self { interface: interface.to_owned(), before }))
    }

    /// Gives the NIC the channels that it had before.
    ///
    /// # Errors
    /// [`NetworkError::ChannelsKept`].
    pub async fn give_back(self) -> Result<(), NetworkError> {
        let Self { interface, before } = self;
        write(&interface, before).await.map_err(|problem| NetworkError::ChannelsKept {
            command: before.command(&interface),
            interface,
            problem,
        })
    }
}

/// Channels of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Kind {
    count: u32,
    /// Zero where the NIC has none of the kind.
    most: u32,
}

/// What a NIC has and could have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Offer {
    /// Channels that receive and send.
    combined: Kind,
    /// Channels that only receive.
    rx: Kind,
    /// Channels that only send.
    tx: Kind,
}

/// Channels to be set; `None` of a kind that the NIC does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Setting {
    combined: Option<u32>,
    rx: Option<u32>,
    tx: Option<u32>,
}

impl Offer {
    fn now(self) -> Setting {
        let count = |kind: Kind| (kind.most > 0).then_some(kind.count);
        Setting { combined: count(self.combined), rx: count(self.rx), tx: count(self.tx) }
    }

    /// How so many queues receive, and as many send.
    fn setting(self, wanted: u32) -> Result<Setting, String> {
        let Self { combined, rx, tx } = self;
        let (most, kinds) = match combined.most {
            0 => (rx.most.min(tx.most), "receive and send channels"),
            most => (most, "combined channels"),
        };
        if most == 0 {
            return Err("its driver has none whose number could be set: take `channels` away".into());
        }
        if wanted > most {
            return Err(format!("it has {most} {kinds} at most: lower `channels`"));
        }
        if combined.most == 0 {
            return Ok(Setting { combined: None, rx: Some(wanted), tx: Some(wanted) });
        }
        // One of a kind beside them would be a queue of the other kind less.
        let none = |kind: Kind| (kind.most > 0).then_some(0);
        Ok(Setting { combined: Some(wanted), rx: none(rx), tx: none(tx) })
    }
}

impl Setting {
    /// The command that does it.
    fn command(self, interface: &str) -> String {
        let kinds = [("combined", self.combined), ("rx", self.rx), ("tx", self.tx)];
        let words = kinds.iter().filter_map(|(kind, count)| Some(format!(" {kind} {}", (*count)?)));
        format!("ethtool -L {interface}{}", words.collect::<String>())
    }
}

/// What the kernel says of a NIC's channels.
async fn read(interface: &str) -> Result<Offer, String> {
    let (connection, mut handle, _) = ethtool::new_connection().map_err(|error| error.to_string())?;
    let connection = tokio::spawn(connection);
    let answer = handle.channel().get(Some(interface)).execute().await;
    let answer = match answer {
        Ok(messages) => {
            messages.map(|message| message.map(|message| message.payload.nlas)).try_concat().await
        }
        Err(error) => Err(error),
    };
    connection.abort();
    let mut offer = Offer::default();
    for attribute in answer.map_err(|error| explained(&error))? {
        let EthtoolAttr::Channel(attribute) = attribute else { continue };
        match attribute {
            EthtoolChannelAttr::CombinedCount(count) => offer.combined.count = count,
            EthtoolChannelAttr::CombinedMax(most) => offer.combined.most = most,
            EthtoolChannelAttr::RxCount(count) => offer.rx.count = count,
            EthtoolChannelAttr::RxMax(most) => offer.rx.most = most,
            EthtoolChannelAttr::TxCount(count) => offer.tx.count = count,
            EthtoolChannelAttr::TxMax(most) => offer.tx.most = most,
            _ => {}
        }
    }
    Ok(offer)
}

async fn write(interface: &str, setting: Setting) -> Result<(), String> {
    let had_link = has_link(interface);
    let (connection, mut handle, _) = ethtool::new_connection().map_err(|error| error.to_string())?;
    let connection = tokio::spawn(connection);
    let mut request = handle.channel().set(interface);
    if let Some(combined) = setting.combined {
        request = request.combined_count(combined);
    }
    if let Some(rx) = setting.rx {
        request = request.rx_count(rx);
    }
    if let Some(tx) = setting.tx {
        request = request.tx_count(tx);
    }
    let answer = request.execute().await;
    connection.abort();
    answer
        .map_err(|error| format!("{}; `{}` may say more", explained(&error), setting.command(interface)))?;
    let begun = Instant::now();
    while had_link && !has_link(interface) && begun.elapsed() < CARRIER_LIMIT {
        tokio::time::sleep(CARRIER_INTERVAL).await;
    }
    Ok(())
}

fn explained(error: &EthtoolError) -> String {
    match error {
        EthtoolError::NetlinkError(answer) => match answer.to_io() {
            error if error.kind() == std::io::ErrorKind::Unsupported => {
                "its driver knows no channels: take `channels` away".into()
            }
            error => format!("its driver refuses ({error})"),
        },
        other => other.to_string(),
    }
}

/// Whether the link is up. Reading `carrier` of an interface that is down is EINVAL.
fn has_link(interface: &str) -> bool {
    let carrier = std::fs::read_to_string(Path::new("/sys/class/net").join(interface).join("carrier"));
    carrier.is_ok_and(|text| text.trim() == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(count: u32, most: u32) -> Kind {
        Kind { count, most }
    }

    #[test]
    fn combined_channels_come_first() {
        let offer = Offer { combined: kind(8, 16), ..Offer::default() };
        let setting = offer.setting(4).unwrap();
        assert_eq!(setting, Setting { combined: Some(4), rx: None, tx: None });
        assert_eq!(setting.command("eno2"), "ethtool -L eno2 combined 4");
        assert_eq!(offer.setting(8), Ok(offer.now()), "nothing to change");
        // Some drivers have both, and all queues should do both.
        let offer = Offer { combined: kind(0, 8), rx: kind(8, 8), tx: kind(8, 8) };
        assert_eq!(offer.setting(2).unwrap(), Setting { combined: Some(2), rx: Some(0), tx: Some(0) });
        assert_eq!(offer.now().command("eno2"), "ethtool -L eno2 combined 0 rx 8 tx 8");
    }

    #[test]
    fn else_as_many_receive_as_send() {
        let offer = Offer { rx: kind(1, 4), tx: kind(1, 2), ..Offer::default() };
        assert_eq!(offer.setting(2).unwrap(), Setting { combined: None, rx: Some(2), tx: Some(2) });
        assert!(offer.setting(3).unwrap_err().contains("2 receive and send channels at most"));
    }

    #[test]
    fn what_cannot_be_is_told() {
        let offer = Offer { combined: kind(1, 16), ..Offer::default() };
        assert!(offer.setting(17).unwrap_err().contains("16 combined channels at most"));
        let fixed = Offer { tx: kind(1, 1), ..Offer::default() };
        assert!(fixed.setting(1).unwrap_err().contains("take `channels` away"));
    }
}
