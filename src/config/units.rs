//! Durations and sizes as people write them: `500ms`, `8s`, `24h`; `4MiB`, `256MB`.

use std::net::SocketAddr;
use std::time::Duration;

const DURATION_UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
const SIZE_UNITS: [(&str, u64); 7] = [
    ("B", 1),
    ("KB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
];

/// Reads a duration: a whole number and a unit.
///
/// # Errors
/// A sentence that says what a duration looks like.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let millis = parse(text, &DURATION_UNITS).ok_or_else(|| {
        format!("'{text}' is not a duration; write a whole number and one of ms, s, m, h, d: 500ms, 8s, 24h")
    })?;
    Ok(Duration::from_millis(millis))
}

/// A duration as [`parse_duration`] reads it, in the largest unit that it is a whole number of.
#[must_use]
pub fn show_duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let largest = DURATION_UNITS.iter().rev().find(|(_, factor)| millis > 0 && millis.is_multiple_of(*factor));
    let (name, factor) = largest.unwrap_or(&DURATION_UNITS[0]);
    format!("{}{name}", millis / factor)
}

/// Reads where to listen: an address and a port, or a port of this machine's loopback alone.
///
/// # Errors
/// A sentence that says what can be written.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let text = text.trim();
    let address = match text.strip_prefix(':').unwrap_or(text).parse::<u16>() {
        Ok(port) => Some(SocketAddr::from(([127, 0, 0, 1], port))),
        Err(_) => text.parse().ok(),
    };
    address
        .ok_or_else(|| format!("'{text}' is not an address; write 127.0.0.1:9180, or 0.0.0.0:9180 for every network"))
}

/// Reads for how long something is kept: a duration, or `forever`, which is `None`.
///
/// # Errors
/// A sentence that says what can be written.
pub fn parse_retention(text: &str) -> Result<Option<Duration>, String> {
    match text.trim() {
        "forever" => Ok(None),
        "0" | "off" => Err(format!("'{text}' could mean two things; write forever, or a duration: 30d")),
        other => match parse_duration(other) {
            Ok(Duration::ZERO) => {
                Err(format!("'{text}' would keep nothing but the newest state; write a duration: 30d"))
            }
            parsed => parsed.map(Some).map_err(|why| format!("{why}; or forever")),
        },
    }
}

/// Reads a size in bytes: a whole number and a unit.
///
/// # Errors
/// A sentence that says what a size looks like.
pub fn parse_size(text: &str) -> Result<u64, String> {
    parse(text, &SIZE_UNITS).ok_or_else(|| {
        format!("'{text}' is not a size; write a whole number and one of B, KB, MB, GB, KiB, MiB, GiB: 4MiB, 256MB")
    })
}

fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim())?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        for text in ["0ms", "1500ms", "90s", "24h", "30d"] {
            let shown = if text == "24h" { "1d" } else { text };
            assert_eq!(show_duration(parse_duration(text).unwrap()), shown);
        }
        assert_eq!(parse_duration("2 h"), Ok(Duration::from_secs(7200)));
        assert_eq!(parse_size("4MiB"), Ok(4 << 20));
        assert_eq!(parse_size("256MB"), Ok(256_000_000));
        for wrong in ["", "5", "s", "-1s", "1.5s", "1y", "99999999999999999999s", "18446744073709551615h"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
        assert!(parse_size("4mib").unwrap_err().contains("4MiB"));
        assert_eq!(parse_address(":9180").unwrap().to_string(), "127.0.0.1:9180");
        assert_eq!(parse_address("[::]:9180").unwrap().to_string(), "[::]:9180");
        assert!(parse_address("localhost").is_err());
        assert_eq!(parse_retention("forever"), Ok(None));
        assert_eq!(parse_retention("30d"), Ok(Some(Duration::from_secs(30 * 86_400))));
        for wrong in ["off", "0", "30", "0d", "0ms"] {
            assert!(parse_retention(wrong).is_err(), "{wrong}");
        }
    }
}
