//! What the TOML reader found wrong, as one sentence. It never shows the line itself, which may hold a secret.

/// Says what is wrong and in which line; for a key that there is not, which one may have been meant.
#[must_use]
pub fn explain(text: &str, error: &toml::de::Error) -> String {
    let what = unknown_key(error.message()).unwrap_or_else(|| error.message().trim().replace('\n', "; "));
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else { return what };
    let line = 1 + before.matches('\n').count();
    key_before(before).map_or_else(|| format!("line {line}: {what}"), |key| format!("line {line}: {key}: {what}"))
}

/// The key of a value, when the text ends where the value begins.
fn key_before(before: &str) -> Option<&str> {
    let line = before.trim_end_matches([' ', '\t']).strip_suffix('=')?.trim_end_matches([' ', '\t']);
    let key = line.rsplit(|letter: char| !letter.is_ascii_alphanumeric() && letter != '-').next()?;
    (!key.is_empty()).then_some(key)
}

/// serde's "unknown field `a`, expected one of `b`, `c`", for people.
fn unknown_key(message: &str) -> Option<String> {
    let mut names = message.strip_prefix("unknown field ")?.split('`').skip(1).step_by(2);
    let unknown = names.next()?;
    let known: Vec<&str> = names.collect();
    let closest = known.iter().min_by_key(|name| distance(unknown, name))?;
    Some(match distance(unknown, closest) <= (unknown.len() / 4).max(2) {
        true => format!("unknown key '{unknown}'; did you mean '{closest}'?"),
        false => format!("unknown key '{unknown}'; there are {}", known.join(", ")),
    })
}

/// How many letters must be added, removed or changed to make one of the other (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (line, from) in one.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (column, to) in other.bytes().enumerate() {
            let changed = diagonal + usize::from(from != to);
            diagonal = row[column + 1];
            row[column + 1] = changed.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (one, other, letters) in [
            ("", "", 0),
            ("", "abc", 3),
            ("path", "path", 0),
            ("kye", "key", 2),
            ("replika", "replica", 1),
            ("a", "bc", 2),
        ] {
            assert_eq!((distance(one, other), distance(other, one)), (letters, letters), "{one} {other}");
        }
    }
}
