//! Users and groups of this host, by the files that passwd(5) and group(5) describe. Those of a directory service are
//! not among them: a group of one is configured by its number.

use std::path::Path;

const GROUPS: &str = "/etc/group";
const USERS: &str = "/etc/passwd";

/// The number of a group; `None` when there is no such group.
///
/// # Errors
/// When the file of groups cannot be read.
pub fn group_id(name: &str) -> std::io::Result<Option<u32>> {
    Ok(number_of(&std::fs::read_to_string(Path::new(GROUPS))?, name))
}

/// The name of a group, or its number where it has none here.
pub fn group_name(gid: u32) -> String {
    name_of(&std::fs::read_to_string(Path::new(GROUPS)).unwrap_or_default(), gid)
}

/// The name of a user, or its number where it has none here.
pub fn user_name(uid: u32) -> String {
    name_of(&std::fs::read_to_string(Path::new(USERS)).unwrap_or_default(), uid)
}

/// Name and number of each line: both files begin with name, password, number.
fn entries(text: &str) -> impl Iterator<Item = (&str, u32)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        Some((name, fields.nth(1)?.parse().ok()?))
    })
}

fn number_of(text: &str, name: &str) -> Option<u32> {
    entries(text).find(|(other, _)| *other == name).map(|(_, number)| number)
}

fn name_of(text: &str, number: u32) -> String {
    let found = entries(text).find(|(_, other)| *other == number);
    found.map_or_else(|| number.to_string(), |(name, _)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        let text = "root:x:0:\n# a comment\nxferry:x:977:ann,bob\nbroken:x\nkvm:x:93:\n";
        assert_eq!((number_of(text, "xferry"), number_of(text, "xferr")), (Some(977), None));
        assert_eq!((name_of(text, 93), name_of(text, 94)), ("kvm".into(), "94".into()));
        assert_eq!(group_id("root").unwrap(), Some(0));
    }
}
