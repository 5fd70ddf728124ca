//! Times of log lines: ISO 8601 in UTC with milliseconds.

/// Length of a time in bytes.
pub(super) const TIME_LENGTH: usize = "2026-01-31T23:59:59.999Z".len();

const DAY_S: u64 = 24 * 60 * 60;

/// Writes a time since the epoch to `out`, which has [`TIME_LENGTH`] bytes.
pub(super) fn write_time(realtime_ns: u64, out: &mut [u8]) {
    let seconds = realtime_ns / 1_000_000_000;
    let (year, month, day) = date(seconds / DAY_S);
    let of_day = seconds % DAY_S;
    let fields = [
        (0, 4, year),
        (5, 2, month),
        (8, 2, day),
        (11, 2, of_day / 3600),
        (14, 2, of_day / 60 % 60),
        (17, 2, of_day % 60),
        (20, 3, realtime_ns / 1_000_000 % 1000),
    ];
    out.copy_from_slice(b"0000-00-00T00:00:00.000Z");
    for (start, digits, value) in fields {
        let mut value = value;
        for place in out[start..start + digits].iter_mut().rev() {
            *place = b'0' + u8::try_from(value % 10).unwrap_or_default();
            value /= 10;
        }
    }
}

/// Year, month and day of a day since the epoch, in the Gregorian calendar.
fn date(day: u64) -> (u64, u64, u64) {
    let mut day = day;
    let mut year = 1970;
    // Whole periods of 400 years first: the length of the loop has a bound.
    year += day / 146_097 * 400;
    day %= 146_097;
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    (year, month, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(seconds: u64, milliseconds: u64) -> String {
        let mut text = [0; TIME_LENGTH];
        write_time(seconds * 1_000_000_000 + milliseconds * 1_000_000, &mut text);
        String::from_utf8(text.to_vec()).expect("text")
    }

    #[test]
    fn times_are_iso_8601_in_utc() {
        for (seconds, milliseconds, text) in [
            (0, 0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, 999, "2000-02-28T23:59:59.999Z"),
            (951_782_400, 0, "2000-02-29T00:00:00.000Z"),
            (1_735_689_599, 7, "2024-12-31T23:59:59.007Z"),
            (1_772_323_200, 40, "2026-03-01T00:00:00.040Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(text_of(seconds, milliseconds), text);
        }
    }
}
