//! How long a request may take: as long as its client says, by `grpc-timeout` or over HTTP by
//! `x-request-timeout`, and never longer than the router's own limits, which are long. Nothing else
//! ends work that progresses.

use crate::{RouterError, config::Deadlines, facts::Facts};
use http::{HeaderMap, HeaderName};
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, sleep_until};

/// Seconds, decimals allowed.
const HTTP: HeaderName = HeaderName::from_static("x-request-timeout");
/// At most eight digits and a unit, as the gRPC protocol has it.
const GRPC: HeaderName = HeaderName::from_static("grpc-timeout");
const GRPC_DIGITS_MAX: usize = 8;
/// Longer limits are as good as none.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);

/// How long a request may take, counted from its arrival.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TimeLimit {
    began: Instant,
    /// In all.
    pub total: Duration,
    /// Until its first token.
    first_token: Duration,
}

impl TimeLimit {
    fn new(own: Option<Duration>, deadlines: &Deadlines) -> Self {
        let total = own.unwrap_or(LONGEST).min(deadlines.total).min(LONGEST);
        Self { began: Instant::now(), total, first_token: deadlines.first_token.min(total) }
    }

    /// With what `x-request-timeout` says, counted from now. Errors: `Invalid`.
    pub fn from_http(headers: &HeaderMap, deadlines: &Deadlines) -> Result<Self, RouterError> {
        let Some(value) = headers.get(HTTP) else { return Ok(Self::new(None, deadlines)) };
        let seconds = value.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok());
        let limit = seconds.filter(|&s| s > 0.0).map(|s| s.min(LONGEST.as_secs_f64()));
        match limit.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()) {
            Some(limit) if !limit.is_zero() => Ok(Self::new(Some(limit), deadlines)),
            _ => {
                let wrong = format!(
                    "x-request-timeout must be a number of seconds above 0, e.g. 2.5, not {:?}",
                    String::from_utf8_lossy(value.as_bytes())
                );
                Err(RouterError::invalid(HTTP.as_str(), wrong))
            }
        }
    }

    /// With what `grpc-timeout` says, counted from now. Errors: `Invalid`.
    pub fn from_grpc(headers: &HeaderMap, deadlines: &Deadlines) -> Result<Self, RouterError> {
        let Some(value) = headers.get(GRPC) else { return Ok(Self::new(None, deadlines)) };
        match value.to_str().ok().and_then(grpc_limit) {
            Some(limit) => Ok(Self::new(Some(limit), deadlines)),
            None => {
                let wrong = format!(
                    "grpc-timeout must be at most eight digits and one of H, M, S, m, u and n, \
                     not {:?}",
                    String::from_utf8_lossy(value.as_bytes())
                );
                Err(RouterError::invalid(GRPC.as_str(), wrong))
            }
        }
    }

    /// When its first token comes too late.
    pub fn first_token_until(&self) -> Instant {
        self.began + self.first_token
    }

    /// Waits until the time is over; says what the request waited for then. Made once for a
    /// request: its timer is not set anew with each token.
    pub async fn over(self, facts: Arc<Facts>) -> RouterError {
        sleep_until(self.first_token_until()).await;
        let mut limit = self.first_token;
        if facts.has_begun() {
            sleep_until(self.began + self.total).await;
            limit = self.total;
        }
        RouterError::Timeout { limit, waited: facts.waits_for() }
    }
}

fn grpc_limit(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let count: u64 = digits.parse().ok().filter(|_| plain && digits.len() <= GRPC_DIGITS_MAX)?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn headers(name: HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn seconds_may_have_decimals() {
        let deadlines = Deadlines::default();
        let limit =
            |text| TimeLimit::from_http(&headers(HTTP, text), &deadlines).map(|limit| limit.total);
        assert_eq!(limit("2.5").unwrap(), Duration::from_millis(2500));
        assert_eq!(limit("30").unwrap(), Duration::from_secs(30));
        assert_eq!(limit("1e300").unwrap(), deadlines.total, "no longer than the router's own");
        for wrong in ["", "0", "-1", "NaN", "-inf", "ten", "1s", "1e-30"] {
            let error = limit(wrong).unwrap_err();
            assert!(error.to_string().contains("x-request-timeout"), "{wrong}: {error}");
        }
        let own = TimeLimit::from_http(&HeaderMap::new(), &deadlines).unwrap();
        assert_eq!((own.total, own.first_token), (deadlines.total, deadlines.first_token));
    }

    #[test]
    fn grpc_timeouts_have_a_unit() {
        for (text, limit) in [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("4m", Duration::from_millis(4)),
            ("5u", Duration::from_micros(5)),
            ("99999999n", Duration::from_nanos(99_999_999)),
        ] {
            assert_eq!(grpc_limit(text), Some(limit), "{text}");
        }
        for wrong in ["", "S", "1", "1s", "-1S", "+1S", "1.5S", "123456789S", "1é"] {
            assert_eq!(grpc_limit(wrong), None, "{wrong}");
        }
        assert!(TimeLimit::from_grpc(&headers(GRPC, "soon"), &Deadlines::default()).is_err());
    }
}
