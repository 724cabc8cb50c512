//! The API's socket: who may talk to the agent.

use std::{
    fs::Permissions,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;

use super::AgentError;
use crate::accounts;

/// Group of the socket when none is configured.
pub(super) const DEFAULT_GROUP: &str = "xferry";
/// Its owner and its group read and write, which is what connecting needs (unix(7)).
const MODE: u32 = 0o660;
/// Connections that wait to be taken.
const BACKLOG: i32 = 128;

/// `socket-group`: a group's name or number.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "a group's name or its number is wanted here")]
pub enum SocketGroup {
    /// Its number.
    Id(u32),
    /// Its name.
    Name(String),
}

/// Whose socket it is, as `xferry status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SocketStatus {
    /// Where it is.
    pub path: PathBuf,
    /// The group whose members may use it, by name; beside root.
    pub group: String,
    /// What to do so that others than root may use it, where nobody else may.
    pub hint: Option<String>,
}

/// A socket that listens.
pub(super) struct Bound {
    pub listener: UnixListener,
    pub status: SocketStatus,
}

/// Binds the socket, for root and the members of `group` only. One left over from an agent that is gone is replaced.
///
/// # Errors
/// [`AgentError::Host`].
pub(super) fn bind(path: &Path, group: Option<&SocketGroup>) -> Result<Bound, AgentError> {
    let failed = |error: std::io::Error| {
        AgentError::Host(format!("cannot listen on the API socket {}: {error}", path.display()))
    };
    let gid = gid(group)?;
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(AgentError::Host(format!(
            "another agent is serving {}: stop it, or give this one another socket",
            path.display()
        )));
    }
    if let Some(directory) = path.parent() {
        make_way(directory).map_err(failed)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).map_err(failed)?;
    // Nobody is let in before `listen`, so there is no moment at which more may than shall.
    socket.bind(&SockAddr::unix(path).map_err(failed)?).map_err(failed)?;
    if let Some(gid) = gid {
        std::os::unix::fs::chown(path, None, Some(gid)).map_err(|error| {
            AgentError::Host(format!(
                "cannot give the API socket {} to the group {}: {error}: run the agent with that group (SupplementaryGroups={1} in \
                 its unit) or with CAP_CHOWN",
                path.display(),
                accounts::group_name(gid)
            ))
        })?;
    }
    std::fs::set_permissions(path, Permissions::from_mode(MODE)).map_err(failed)?;
    socket.listen(BACKLOG).map_err(failed)?;
    let listener = UnixListener::from_std(socket.into()).map_err(failed)?;
    let hint = gid.is_none().then(|| {
        format!(
            "only root may use it: `groupadd --system {DEFAULT_GROUP}`, restart the agent, and `usermod -aG {DEFAULT_GROUP} USER`"
        )
    });
    let status =
        SocketStatus { path: path.to_owned(), group: accounts::group_name(gid.unwrap_or_default()), hint };
    Ok(Bound { listener, status })
}

/// Makes a directory, and those above it, that everybody may enter. The agent's umask would have it otherwise.
fn make_way(directory: &Path) -> std::io::Result<()> {
    let mut missing: Vec<&Path> = directory.ancestors().take_while(|ancestor| !ancestor.exists()).collect();
    // Of a relative path.
    missing.retain(|ancestor| !ancestor.as_os_str().is_empty());
    missing.iter().rev().try_for_each(|ancestor| {
        std::fs::create_dir(ancestor)?;
        std::fs::set_permissions(ancestor, Permissions::from_mode(0o755))
    })
}

/// The group's number; `None` when none is configured and the default one does not exist.
fn gid(group: Option<&SocketGroup>) -> Result<Option<u32>, AgentError> {
    let name = match group {
        Some(SocketGroup::Id(gid)) => return Ok(Some(*gid)),
        Some(SocketGroup::Name(name)) => name,
        None => DEFAULT_GROUP,
    };
    let found = accounts::group_id(name)
        .map_err(|error| AgentError::Host(format!("cannot look for the group {name:?}: {error}")))?;
    if found.is_none() && group.is_some() {
        return Err(AgentError::Host(format!(
            "there is no group {name:?} on this host, and socket-group says that it may use the API: `groupadd --system {name}`, \
             correct socket-group, or give the group's number"
        )));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_group_that_is_asked_for_must_be_there() {
        let name = |name: &str| SocketGroup::Name(name.into());
        assert_eq!(gid(Some(&SocketGroup::Id(4242))).unwrap(), Some(4242));
        assert_eq!(gid(Some(&name("root"))).unwrap(), Some(0));
        let error = gid(Some(&name("no such group"))).unwrap_err().to_string();
        assert!(error.contains("\"no such group\"") && error.contains("groupadd"), "{error}");
        // There or not, it is no error.
        assert!(gid(None).is_ok());
    }

    #[tokio::test]
    async fn nobody_else_is_let_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deeper/xferry.sock");
        let own = std::fs::metadata(dir.path()).unwrap().gid();
        let bound = bind(&path, Some(&SocketGroup::Id(own))).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.gid()), (0o660, own));
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o755);
        assert_eq!((bound.status.group, bound.status.hint), (accounts::group_name(own), None));
        let second = bind(&path, None).err().unwrap().to_string();
        assert!(second.contains("another agent"), "{second}");
        drop(bound.listener);
        bind(&path, Some(&SocketGroup::Id(own))).unwrap();
    }
}
