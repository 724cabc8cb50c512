//! `xferry pki`: certificates for a small site, or for tests.

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;
use xferry::pki::{self, Validity};

/// Days that a CA is valid.
const CA_DAYS: u32 = 3650;
/// Days that a host's certificate is valid.
const HOST_DAYS: u32 = 365;

#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Make a CA: its certificate (ca.pem) and its key (ca.key), which no host needs
    Init {
        /// Directory of the CA
        #[arg(long, default_value = pki::DEFAULT_CA_DIR)]
        dir: PathBuf,
        /// Name of the CA
        #[arg(long)]
        name: String,
        /// Days that it is valid
        #[arg(long, default_value_t = CA_DAYS, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
        /// Replace a CA that is there: no certificate that it issued is accepted by a host that has the new one
        #[arg(long)]
        force: bool,
    },
    /// Make the three files of a host (ca.pem, agent.pem, agent.key), for /etc/xferry/pki there
    Issue {
        /// Name of the host, as it stands under `name` there and under [peers] elsewhere
        host: String,
        /// Directory of the CA
        #[arg(long, default_value = pki::DEFAULT_CA_DIR)]
        dir: PathBuf,
        /// Where the files go; HOST in the CA's directory when not given
        #[arg(long)]
        out: Option<PathBuf>,
        /// Days that the certificate is valid
        #[arg(long, default_value_t = HOST_DAYS, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
        /// Replace files that are there
        #[arg(long)]
        force: bool,
    },
    /// Put certificates on the CA's list of revoked ones (crl.pem): hosts that have the list refuse them
    Revoke {
        /// A host, of which all certificates that this CA has issued are revoked, or a certificate's file
        #[arg(value_name = "NAME|FILE")]
        what: String,
        /// Directory of the CA
        #[arg(long, default_value = pki::DEFAULT_CA_DIR)]
        dir: PathBuf,
    },
}

pub fn run(command: PkiCommand) -> Result<u8> {
    match command {
        PkiCommand::Init { dir, name, days, force } => {
            let made = pki::init(&dir, &name, Validity::from_now(days), force)?;
            println!("CA {name} in {}; keep {} to yourself", dir.display(), made.key.display());
            println!("next: xferry pki issue HOST --dir {}", dir.display());
        }
        PkiCommand::Issue { host, dir, out, days, force } => {
            let out = out.unwrap_or_else(|| dir.join(&host));
            let issued = pki::issue(&dir, &host, &out, Validity::from_now(days), force)?;
            println!(
                "certificate of {host} until {} in {}: copy its files to {} on {host} (agent.key with mode 0600)",
                issued.until.date(),
                issued.dir.display(),
                pki::DEFAULT_DIR
            );
        }
        PkiCommand::Revoke { what, dir } => {
            let list = pki::revoke(&dir, &what)?;
            for revoked in &list.revoked {
                println!(
                    "{} {}, number {}, until {}",
                    if revoked.before { "revoked already:" } else { "revoked:" },
                    revoked.host,
                    revoked.serial,
                    revoked.until.date()
                );
            }
            let path = list.path.display();
            println!(
                "{path} lists {} certificate(s); nobody refuses them who does not have it:",
                list.listed
            );
            println!(
                "copy it to {} on every host; agents read it within seconds, without a restart",
                pki::DEFAULT_DIR
            );
        }
    }
    Ok(0)
}
