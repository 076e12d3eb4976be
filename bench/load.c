/* The load generator and the sink of the benchmark: `load load ...` and `load sink ...`, one epoll loop each.
 *
 * Why:     neither end may be the bottleneck when the program between them is measured, and a figure counts only when
 *          every reply was the expected one and every accepted message arrived.
 * Trust:   loopback only: an address outside 127.0.0.0/8 is refused.  The peer is a mail server under test: whatever it
 *          sends beyond the script ends the run with the transcript of that session.  Every buffer is bounded.
 * Promise: stops by itself (units, seconds, a deadline for each unit, the parent's death).  The sink's counts are exact:
 *          a message is counted before its 250 is written.
 * Sources: RFC 5321 (dialogue, §4.5.2 dot transparency), RFC 2920 (pipelining), RFC 2034 (enhanced status codes).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define EVENTS 256
#define SCRATCH_OCTETS (512 * 1024)
#define LINE_OCTETS_MAX 4096
#define FROM_MAX 256

static char scratch[LINE_OCTETS_MAX + SCRATCH_OCTETS];

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (memory == NULL)
        die("out of memory");
    return memory;
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static struct sockaddr_in loopback(const char *host, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1 || ntohl(address.sin_addr.s_addr) >> 24 != 127)
        die("%s is not an address in 127.0.0.0/8", host);
    return address;
}

static struct sockaddr_in loopback_port(const char *text) {
    char host[64];
    const char *colon = strrchr(text, ':');
    if (colon == NULL || (size_t)(colon - text) >= sizeof host)
        die("%s is not ADDRESS:PORT", text);
    memcpy(host, text, (size_t)(colon - text));
    host[colon - text] = '\0';
    int port = atoi(colon + 1);
    if (port < 1 || port > 65535)
        die("%s has no port from 1 to 65535", text);
    return loopback(host, port);
}

static void watch(int epoll, int operation, int fd, uint32_t events, void *what) {
    struct epoll_event event = {.events = events, .data.ptr = what};
    if (epoll_ctl(epoll, operation, fd, &event) != 0)
        die("epoll_ctl: %s", strerror(errno));
}

static int signals(sigset_t *set) {
    sigprocmask(SIG_BLOCK, set, NULL);
    int fd = signalfd(-1, set, SFD_NONBLOCK | SFD_CLOEXEC);
    if (fd < 0)
        die("signalfd: %s", strerror(errno));
    return fd;
}

static void prepare(void) {
    struct rlimit files;
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* a benchmark that was killed leaves nothing behind */
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

/* ---- the sink ----------------------------------------------------------------------------------------------------- */

struct peer {
    int fd;
    bool content;    /* between 354 and the end of content */
    bool line_start; /* the octets consumed so far end in CRLF: a dot here may end the content */
    bool mail;       /* a reverse-path was given */
    bool closing;    /* close as soon as `out` is written */
    bool writing;    /* EPOLLOUT is watched: nothing more is read until the peer has read what it is owed */
    unsigned recipients;
    size_t rest; /* octets of `line`: what has been received and not consumed */
    char line[LINE_OCTETS_MAX];
    char *out;
    size_t out_octets, out_sent;
    struct peer *next_free;
};

static struct {
    int epoll;
    const char *refuse; /* RCPT to this domain is refused with 550 */
    size_t refuse_octets;
    struct peer *free;
    uint64_t connections, open, open_max, messages, recipients, refused, octets, resets, errors;
} sink;

/* Consumes content: returns how many of the octets are done with; *ended says whether the final dot was among them.
 * At most two octets stay unconsumed: a CR, or a dot (and CR) at the start of a line, that need their successors. */
static size_t content(struct peer *peer, const char *octets, size_t count, bool *ended) {
    size_t at = 0;
    *ended = false;
    while (at < count) {
        const char *dot = memchr(octets + at, '.', count - at);
        if (dot == NULL)
            break;
        size_t i = (size_t)(dot - octets);
        bool starts_line = i == 0 ? peer->line_start : i >= 2 && octets[i - 1] == '\n' && octets[i - 2] == '\r';
        if (starts_line) {
            if (i + 1 == count || (i + 2 == count && octets[i + 1] == '\r')) {
                sink.octets += i;
                if (i > 0)
                    peer->line_start = true;
                return i;
            }
            if (octets[i + 1] == '\r' && octets[i + 2] == '\n') {
                sink.octets += i;
                *ended = true;
                return i + 3;
            }
            sink.octets--; /* the stuffed dot: RFC 5321 §4.5.2 */
        }
        at = i + 1;
    }
    if (count > 0 && octets[count - 1] == '\r')
        count--;
    if (count > 0)
        peer->line_start = count >= 2 && octets[count - 1] == '\n' && octets[count - 2] == '\r';
    sink.octets += count;
    return count;
}

static char replies[1 << 18];
static size_t replies_octets;

static void reply(struct peer *peer, const char *text, size_t octets) {
    if (replies_octets + octets > sizeof replies) { /* thousands of commands behind content in one segment */
        sink.errors++;
        peer->closing = true;
        return;
    }
    memcpy(replies + replies_octets, text, octets);
    replies_octets += octets;
}
#define REPLY(peer, text) reply(peer, text "\r\n", sizeof(text "\r\n") - 1)

#define GREETING "220 sink.bench.test ESMTP"
#define EHLO                                                                                                           \
    "250-sink.bench.test\r\n250-PIPELINING\r\n250-SIZE 104857600\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n250-DSN\r\n"       \
    "250 ENHANCEDSTATUSCODES"
#define VERB(a, b, c, d) ((uint32_t)(a) << 24 | (uint32_t)(b) << 16 | (uint32_t)(c) << 8 | (uint32_t)(d))

static void forget_transaction(struct peer *peer) {
    peer->mail = false;
    peer->recipients = 0;
}

static bool refused(const char *line, size_t octets) {
    const char *end = memrchr(line, '>', octets);
    if (sink.refuse == NULL || end == NULL || (size_t)(end - line) < sink.refuse_octets + 1)
        return false;
    const char *domain = end - sink.refuse_octets;
    return domain[-1] == '@' && strncasecmp(domain, sink.refuse, sink.refuse_octets) == 0;
}

static void command(struct peer *peer, const char *line, size_t octets) {
    uint32_t verb = 0;
    for (size_t i = 0; i < 4 && i < octets; i++)
        verb = verb << 8 | (unsigned char)(line[i] & ~0x20);
    switch (verb) {
    case VERB('E', 'H', 'L', 'O'):
        forget_transaction(peer);
        REPLY(peer, EHLO);
        break;
    case VERB('H', 'E', 'L', 'O'):
        forget_transaction(peer);
        REPLY(peer, "250 sink.bench.test");
        break;
    case VERB('M', 'A', 'I', 'L'):
        if (octets < 12 || strncasecmp(line + 4, " FROM:<", 7) != 0)
            REPLY(peer, "501 5.5.4 Syntax: MAIL FROM:<reverse-path>");
        else if (peer->mail)
            REPLY(peer, "503 5.5.1 A transaction is open");
        else {
            peer->mail = true;
            REPLY(peer, "250 2.1.0 Ok");
        }
        break;
    case VERB('R', 'C', 'P', 'T'):
        if (octets < 10 || strncasecmp(line + 4, " TO:<", 5) != 0)
            REPLY(peer, "501 5.5.4 Syntax: RCPT TO:<forward-path>");
        else if (!peer->mail)
            REPLY(peer, "503 5.5.1 MAIL first");
        else if (refused(line, octets)) {
            sink.refused++;
            REPLY(peer, "550 5.7.1 Relaying is prohibited");
        } else {
            peer->recipients++;
            REPLY(peer, "250 2.1.5 Ok");
        }
        break;
    case VERB('D', 'A', 'T', 'A'):
        if (!peer->mail)
            REPLY(peer, "503 5.5.1 MAIL first");
        else if (peer->recipients == 0)
            REPLY(peer, "554 5.5.1 No valid recipients");
        else {
            peer->content = peer->line_start = true;
            REPLY(peer, "354 Go ahead");
        }
        break;
    case VERB('R', 'S', 'E', 'T'):
        sink.resets++;
        forget_transaction(peer);
        REPLY(peer, "250 2.0.0 Ok");
        break;
    case VERB('N', 'O', 'O', 'P'):
        REPLY(peer, "250 2.0.0 Ok");
        break;
    case VERB('V', 'R', 'F', 'Y'):
        REPLY(peer, "252 2.0.0 Try it");
        break;
    case VERB('Q', 'U', 'I', 'T'):
        peer->closing = true;
        REPLY(peer, "221 2.0.0 Bye");
        break;
    default:
        sink.errors++;
        REPLY(peer, "500 5.5.1 Unknown command");
    }
}

static void sink_close(struct peer *peer) {
    close(peer->fd);
    free(peer->out);
    peer->out = NULL;
    sink.open--;
    peer->next_free = sink.free;
    sink.free = peer;
}

/* Writes what is owed; keeps what the kernel does not take.  False when the connection is gone. */
static bool sink_write(struct peer *peer) {
    if (peer->out != NULL) {
        ssize_t sent = send(peer->fd, peer->out + peer->out_sent, peer->out_octets - peer->out_sent, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN)
            return false;
        peer->out_sent += sent > 0 ? (size_t)sent : 0;
        if (peer->out_sent < peer->out_octets)
            return true;
        free(peer->out);
        peer->out = NULL;
    } else if (replies_octets > 0) {
        ssize_t sent = send(peer->fd, replies, replies_octets, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN)
            return false;
        size_t done = sent > 0 ? (size_t)sent : 0;
        if (done < replies_octets) {
            peer->out_octets = replies_octets - done;
            peer->out_sent = 0;
            peer->out = allocate(1, peer->out_octets);
            memcpy(peer->out, replies + done, peer->out_octets);
        }
    }
    if ((peer->out != NULL) != peer->writing) {
        peer->writing = peer->out != NULL;
        watch(sink.epoll, EPOLL_CTL_MOD, peer->fd, peer->writing ? EPOLLOUT : EPOLLIN, peer);
    }
    return peer->out != NULL || !peer->closing;
}

/* True while the connection lives. */
static bool sink_read(struct peer *peer) {
    memcpy(scratch, peer->line, peer->rest);
    size_t room = peer->content ? SCRATCH_OCTETS : LINE_OCTETS_MAX; /* commands: their replies fit in one buffer */
    ssize_t received = recv(peer->fd, scratch + peer->rest, room, 0);
    if (received < 0 && errno == EAGAIN)
        return true;
    if (received <= 0)
        return false;
    size_t count = peer->rest + (size_t)received, at = 0;
    replies_octets = 0;
    while (at < count && !peer->closing) {
        if (peer->content) {
            bool ended;
            size_t consumed = content(peer, scratch + at, count - at, &ended);
            at += consumed;
            if (!ended)
                break;
            peer->content = false;
            sink.messages++;
            sink.recipients += peer->recipients;
            forget_transaction(peer);
            REPLY(peer, "250 2.0.0 Ok: taken");
        } else {
            char *end = memchr(scratch + at, '\n', count - at);
            if (end == NULL)
                break;
            size_t octets = (size_t)(end - (scratch + at));
            if (octets == 0 || end[-1] != '\r' || octets > LINE_OCTETS_MAX) {
                sink.errors++;
                REPLY(peer, "500 5.5.2 Lines end with CRLF");
                peer->closing = true;
                break;
            }
            command(peer, scratch + at, octets - 1);
            at += octets + 1;
        }
    }
    peer->rest = count - at;
    if (peer->rest > LINE_OCTETS_MAX && !peer->closing) {
        sink.errors++;
        REPLY(peer, "500 5.5.2 Line too long");
        peer->closing = true;
    }
    if (peer->closing)
        peer->rest = 0;
    memcpy(peer->line, scratch + at, peer->rest);
    return sink_write(peer);
}

static void sink_accept(int listener) {
    for (int i = 0; i < 64; i++) {
        int one = 1, fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EAGAIN || errno == ECONNABORTED || errno == EINTR)
                return;
            die("accept: %s", strerror(errno));
        }
        struct peer *peer = sink.free;
        if (peer != NULL)
            sink.free = peer->next_free;
        else
            peer = allocate(1, sizeof *peer);
        memset(peer, 0, offsetof(struct peer, line));
        peer->out = NULL;
        peer->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        watch(sink.epoll, EPOLL_CTL_ADD, fd, EPOLLIN, peer);
        sink.connections++;
        if (++sink.open > sink.open_max)
            sink.open_max = sink.open;
        replies_octets = 0;
        REPLY(peer, GREETING);
        if (!sink_write(peer))
            sink_close(peer);
    }
}

static void sink_report(void) {
    printf("{\"connections\": %ju, \"open\": %ju, \"open_max\": %ju, \"messages\": %ju, \"recipients\": %ju, "
           "\"refused\": %ju, \"octets\": %ju, \"resets\": %ju, \"errors\": %ju}\n",
           (uintmax_t)sink.connections, (uintmax_t)sink.open, (uintmax_t)sink.open_max, (uintmax_t)sink.messages,
           (uintmax_t)sink.recipients, (uintmax_t)sink.refused, (uintmax_t)sink.octets, (uintmax_t)sink.resets,
           (uintmax_t)sink.errors);
    fflush(stdout);
}

static int run_sink(int count, char **options) {
    const char *listen_on = NULL;
    for (int i = 0; i + 1 < count; i += 2) {
        if (strcmp(options[i], "--listen") == 0)
            listen_on = options[i + 1];
        else if (strcmp(options[i], "--refuse") == 0)
            sink.refuse = options[i + 1];
        else
            die("sink does not know %s", options[i]);
    }
    if (listen_on == NULL || count % 2 != 0)
        die("usage: load sink --listen 127.0.0.1:PORT [--refuse DOMAIN]");
    sink.refuse_octets = sink.refuse == NULL ? 0 : strlen(sink.refuse);

    struct sockaddr_in address = loopback_port(listen_on);
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 4096) != 0)
        die("%s: %s", listen_on, strerror(errno));

    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGUSR1);
    int signal_fd = signals(&set), listener_mark, signal_mark;
    sink.epoll = epoll_create1(EPOLL_CLOEXEC);
    watch(sink.epoll, EPOLL_CTL_ADD, listener, EPOLLIN, &listener_mark);
    watch(sink.epoll, EPOLL_CTL_ADD, signal_fd, EPOLLIN, &signal_mark);
    puts("ready");
    fflush(stdout);

    for (;;) {
        struct epoll_event events[EVENTS];
        int happened = epoll_wait(sink.epoll, events, EVENTS, -1);
        bool asked = false;
        for (int i = 0; i < happened; i++) {
            if (events[i].data.ptr == &listener_mark)
                sink_accept(listener);
            else if (events[i].data.ptr == &signal_mark)
                asked = true;
            else {
                struct peer *peer = events[i].data.ptr;
                if (!(peer->writing ? sink_write(peer) : sink_read(peer)))
                    sink_close(peer);
            }
        }
        if (asked) {
            struct signalfd_siginfo information;
            while (read(signal_fd, &information, sizeof information) == sizeof information) {
                sink_report();
                if (information.ssi_signo != SIGUSR1)
                    return 0;
            }
        }
    }
}

/* ---- the generator ------------------------------------------------------------------------------------------------ */

#define REPLIES_MAX 3
#define STEPS_MAX 8

struct step {
    const char *name;
    const char *octets;
    size_t count;
    int replies;
    int codes[REPLIES_MAX][2]; /* for each reply the codes that are right */
    bool is_content;
};

enum { TRANSCRIPT_OCTETS = 2048, REPLY_OCTETS_MAX = 8192 };

struct session {
    int fd;
    int step;     /* index in `steps`; -1: waiting for the greeting */
    int replies;  /* of this step, seen so far */
    size_t sent;  /* octets of this step */
    bool writing; /* EPOLLOUT is watched */
    bool held;    /* idle: greeted */
    unsigned messages_left;
    int64_t began_ns; /* the unit's start */
    int64_t deadline_ns;
    size_t in_octets;
    char in[REPLY_OCTETS_MAX];
    size_t transcript_octets;
    char transcript[TRANSCRIPT_OCTETS];
};

static struct {
    int epoll;
    struct sockaddr_in to, from[FROM_MAX];
    unsigned from_count, from_next;
    unsigned sessions, messages_each;
    uint64_t units, units_begun, units_done, connections, messages;
    double seconds, unit_seconds;
    size_t size;
    bool refuse, pipelining, hold;
    const char *recipient, *sender;
    int64_t start_ns, end_ns;
    struct step steps[STEPS_MAX];
    int first_message_step, last_message_step, quit_step;
    uint32_t *latencies_us;
    struct session *all;
    unsigned living, held, lost;
} load = {.sessions = 50, .messages_each = 1, .units = 1000, .seconds = 10, .unit_seconds = 30, .size = 4096};

static void note(struct session *session, char who, const char *octets, size_t count) {
    size_t room = TRANSCRIPT_OCTETS - session->transcript_octets;
    if (count > 300)
        count = 300;
    if (room < count + 3)
        return;
    char *to = session->transcript + session->transcript_octets;
    to[0] = who;
    to[1] = ' ';
    memcpy(to + 2, octets, count);
    session->transcript_octets += count + 2;
}

__attribute__((noreturn)) static void failed(struct session *session, const char *why) {
    fprintf(stderr, "load: a unit failed: %s\n", why);
    for (size_t i = 0; i < session->transcript_octets; i++) {
        unsigned char c = (unsigned char)session->transcript[i];
        if (c == '\n' || (c >= ' ' && c < 127))
            fputc(c, stderr);
        else if (c != '\r')
            fprintf(stderr, "\\x%02x", c);
    }
    exit(3);
}

static bool more_units(int64_t now) { return load.units_begun < load.units && now < load.end_ns; }

static void session_end(struct session *session) {
    close(session->fd);
    session->fd = -1;
    load.living--;
}

static void session_begin(struct session *session, int64_t now) {
    int one = 1;
    session->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (session->fd < 0)
        die("socket: %s", strerror(errno));
    if (load.from_count > 0) {
        struct sockaddr_in *from = &load.from[load.from_next++ % load.from_count];
        setsockopt(session->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        setsockopt(session->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
        if (bind(session->fd, (struct sockaddr *)from, sizeof *from) != 0)
            die("bind: %s", strerror(errno));
    }
    setsockopt(session->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    session->step = -1;
    session->replies = 0;
    session->sent = 0;
    session->in_octets = session->transcript_octets = 0;
    session->writing = session->held = false;
    session->messages_left = load.messages_each;
    session->began_ns = now;
    session->deadline_ns = now + (int64_t)(load.unit_seconds * 1e9);
    if (connect(session->fd, (struct sockaddr *)&load.to, sizeof load.to) != 0 && errno != EINPROGRESS)
        failed(session, strerror(errno));
    watch(load.epoll, EPOLL_CTL_ADD, session->fd, EPOLLIN, session);
    load.connections++;
    load.living++;
    if (load.messages_each == 1)
        load.units_begun++;
}

static void unit_done(struct session *session, int64_t now) {
    int64_t us = (now - session->began_ns) / 1000;
    load.latencies_us[load.units_done++] = us > UINT32_MAX ? UINT32_MAX : (uint32_t)us;
}

static void session_write(struct session *session) {
    struct step *step = &load.steps[session->step];
    while (session->sent < step->count) {
        ssize_t sent = send(session->fd, step->octets + session->sent, step->count - session->sent, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno != EAGAIN)
                failed(session, strerror(errno));
            if (!session->writing) {
                session->writing = true;
                watch(load.epoll, EPOLL_CTL_MOD, session->fd, EPOLLIN | EPOLLOUT, session);
            }
            return;
        }
        session->sent += (size_t)sent;
    }
    if (session->writing) {
        session->writing = false;
        watch(load.epoll, EPOLL_CTL_MOD, session->fd, EPOLLIN, session);
    }
}

static void take_step(struct session *session, int step, int64_t now) {
    session->step = step;
    session->replies = 0;
    session->sent = 0;
    if (step == load.first_message_step && load.messages_each != 1) {
        session->began_ns = now;
        load.units_begun++;
    }
    session->deadline_ns = now + (int64_t)(load.unit_seconds * 1e9);
    if (load.steps[step].is_content) {
        static const char text[] = "(the content, and the dot)\r\n";
        note(session, 'C', text, sizeof text - 1);
    } else
        note(session, 'C', load.steps[step].octets, load.steps[step].count);
    session_write(session);
}

/* One whole reply was read.  False when the session is over. */
static bool advance(struct session *session, int code, int64_t now) {
    if (session->step < 0) {
        if (code != 220)
            failed(session, "the greeting is not 220");
        if (load.hold) {
            session->held = true;
            load.held++;
            return true;
        }
        take_step(session, 0, now);
        return true;
    }
    struct step *step = &load.steps[session->step];
    if (session->sent < step->count)
        failed(session, "a reply before the command was sent whole");
    if (session->replies == step->replies)
        failed(session, "a reply that nothing asked for");
    int *codes = step->codes[session->replies++];
    if (code != codes[0] && code != codes[1])
        failed(session, step->name);
    if (session->replies < step->replies)
        return true;
    if (session->step == load.quit_step) {
        if (load.messages_each == 1)
            unit_done(session, now);
        session_end(session);
        return false;
    }
    if (session->step == load.last_message_step) {
        if (!load.refuse)
            load.messages++;
        if (load.messages_each != 1)
            unit_done(session, now);
        if (--session->messages_left > 0 && more_units(now)) {
            session->transcript_octets = 0;
            take_step(session, load.first_message_step, now);
        } else
            take_step(session, load.quit_step, now);
        return true;
    }
    take_step(session, session->step + 1, now);
    return true;
}

/* False when the session is over. */
static bool session_read(struct session *session) {
    ssize_t received =
        recv(session->fd, session->in + session->in_octets, REPLY_OCTETS_MAX - session->in_octets, 0);
    if (received < 0 && errno == EAGAIN)
        return true;
    if (received <= 0) {
        if (load.hold) {
            load.lost++;
            if (session->held)
                load.held--;
            session_end(session);
            return false;
        }
        failed(session, received == 0 ? "the server closed the connection" : strerror(errno));
    }
    session->in_octets += (size_t)received;
    int64_t now = now_ns();
    size_t at = 0, reply_at = 0;
    for (;;) {
        char *end = memchr(session->in + at, '\n', session->in_octets - at);
        if (end == NULL)
            break;
        char *line = session->in + at;
        size_t octets = (size_t)(end - line) + 1;
        at += octets;
        note(session, 'S', line, octets);
        if (octets < 5 || end[-1] != '\r')
            failed(session, "a reply line is not one");
        if (line[3] == '-')
            continue;
        reply_at = at;
        if (!advance(session, atoi(line), now))
            return false;
    }
    memmove(session->in, session->in + reply_at, session->in_octets - reply_at);
    session->in_octets -= reply_at;
    if (session->in_octets == REPLY_OCTETS_MAX)
        failed(session, "a reply without an end");
    return true;
}

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static double latency_ms(double quantile) {
    if (load.units_done == 0)
        return 0;
    uint64_t i = (uint64_t)(quantile * (double)load.units_done);
    return load.latencies_us[i < load.units_done ? i : load.units_done - 1] / 1000.0;
}

static char *message(size_t *count) {
    static const char header[] = "From: <sender@stranger.test>\r\nTo: <user@example.com>\r\n"
                                 "Subject: benchmark\r\nDate: Mon, 23 Nov 2026 12:00:00 +0000\r\n"
                                 "Message-ID: <benchmark@stranger.test>\r\n\r\n";
    const size_t line = 72;
    if (load.size < sizeof header + 1)
        die("--size is below the %zu octets of the header section", sizeof header + 1);
    char *octets = allocate(1, load.size + 3);
    memcpy(octets, header, sizeof header - 1);
    for (size_t i = sizeof header - 1, column = 0; i < load.size; i++, column++) {
        bool at_end = i + 2 >= load.size || column >= line;
        if (!at_end)
            octets[i] = (char)('a' + (char)(i % 26));
        else if (i + 1 < load.size) {
            octets[i] = '\r';
            octets[++i] = '\n';
            column = (size_t)-1;
        }
    }
    octets[load.size - 2] = '\r';
    octets[load.size - 1] = '\n';
    memcpy(octets + load.size, ".\r\n", 3);
    *count = load.size + 3;
    return octets;
}

static char *format(size_t *count, const char *pattern, const char *argument) {
    char *text;
    int octets = asprintf(&text, pattern, argument);
    if (octets < 0)
        die("out of memory");
    *count = (size_t)octets;
    return text;
}

static void script(void) {
    int n = 0;
    struct step *s = load.steps;
    s[n] = (struct step){.name = "EHLO was not answered 250", .replies = 1, .codes = {{250, 250}}};
    s[n].octets = "EHLO client.stranger.test\r\n";
    s[n].count = strlen(s[n].octets);
    n++;
    load.first_message_step = n;
    s[n] = (struct step){.name = "MAIL was not answered 250", .replies = 1, .codes = {{250, 250}}};
    s[n].octets = format(&s[n].count, "MAIL FROM:<%s>\r\n", load.sender);
    n++;
    s[n] = (struct step){.name = "RCPT was not answered 250", .replies = 1, .codes = {{250, 250}}};
    s[n].octets = format(&s[n].count, "RCPT TO:<%s>\r\n", load.recipient);
    if (load.refuse) {
        s[n].name = "RCPT was not refused with 550 or 554";
        s[n].codes[0][0] = 550;
        s[n].codes[0][1] = 554;
    } else {
        n++;
        s[n] = (struct step){.name = "DATA was not answered 354", .replies = 1, .codes = {{354, 354}}};
        s[n].octets = "DATA\r\n";
        s[n].count = strlen(s[n].octets);
    }
    if (load.pipelining) { /* RFC 2920: MAIL, RCPT and DATA in one segment */
        struct step *mail = &s[load.first_message_step];
        char *all = allocate(1, 2048);
        mail->name = "MAIL, RCPT, DATA in one segment were not answered as expected";
        for (int i = load.first_message_step; i <= n; i++) {
            memcpy(mail->codes[i - load.first_message_step], s[i].codes[0], sizeof s[i].codes[0]);
            strncat(all, s[i].octets, 600);
        }
        mail->replies = n - load.first_message_step + 1;
        mail->octets = all;
        mail->count = strlen(all);
        n = load.first_message_step;
    }
    if (!load.refuse) {
        n++;
        s[n] = (struct step){
            .name = "content was not answered 250", .replies = 1, .codes = {{250, 250}}, .is_content = true};
        s[n].octets = message(&s[n].count);
    }
    load.last_message_step = n++;
    s[n] = (struct step){.name = "QUIT was not answered 221", .replies = 1, .codes = {{221, 221}}};
    s[n].octets = "QUIT\r\n";
    s[n].count = strlen(s[n].octets);
    load.quit_step = n;
}

/* "127.0.0.3" or "127.0.0.3-127.0.0.40": one client after another takes the next address. */
static void sources(char *text) {
    char *dash = strchr(text, '-');
    if (dash != NULL)
        *dash = '\0';
    struct sockaddr_in first = loopback(text, 0), last = dash == NULL ? first : loopback(dash + 1, 0);
    for (uint32_t a = ntohl(first.sin_addr.s_addr); a <= ntohl(last.sin_addr.s_addr); a++) {
        if (load.from_count == FROM_MAX)
            die("more than %d source addresses", FROM_MAX);
        load.from[load.from_count] = first;
        load.from[load.from_count++].sin_addr.s_addr = htonl(a);
    }
}

static bool stdin_ended(void) {
    char octets[64];
    return read(STDIN_FILENO, octets, sizeof octets) == 0;
}

static int run_load(int count, char **options) {
    const char *to = NULL;
    load.sender = "sender@stranger.test";
    load.recipient = "user@example.com";
    for (int i = 0; i < count; i++) {
        const char *name = options[i];
        if (strcmp(name, "--pipelining") == 0)
            load.pipelining = true;
        else if (strcmp(name, "--refuse") == 0)
            load.refuse = true;
        else if (strcmp(name, "--hold") == 0)
            load.hold = true;
        else if (i + 1 == count)
            die("load does not know %s, or its value is missing", name);
        else {
            char *value = options[++i];
            if (strcmp(name, "--to") == 0)
                to = value;
            else if (strcmp(name, "--from") == 0)
                sources(value);
            else if (strcmp(name, "--sessions") == 0)
                load.sessions = (unsigned)atoi(value);
            else if (strcmp(name, "--messages-each") == 0)
                load.messages_each = (unsigned)atoi(value);
            else if (strcmp(name, "--units") == 0)
                load.units = (uint64_t)atoll(value);
            else if (strcmp(name, "--seconds") == 0)
                load.seconds = atof(value);
            else if (strcmp(name, "--unit-seconds") == 0)
                load.unit_seconds = atof(value);
            else if (strcmp(name, "--size") == 0)
                load.size = (size_t)atoll(value);
            else if (strcmp(name, "--recipient") == 0)
                load.recipient = value;
            else if (strcmp(name, "--sender") == 0)
                load.sender = value;
            else
                die("load does not know %s", name);
        }
    }
    if (to == NULL || load.sessions < 1 || load.sessions > 15000 || load.messages_each < 1 || load.units < 1 ||
        load.units > 10000000 || load.seconds <= 0 || load.seconds > 600 || load.unit_seconds <= 0 ||
        strlen(load.sender) > 256 || strlen(load.recipient) > 256)
        die("usage: load load --to 127.0.0.1:PORT [--from A[-B]] [--sessions N] [--units N] [--seconds S] "
            "[--messages-each N] [--size OCTETS] [--sender A] [--recipient A] [--refuse] [--pipelining] [--hold]");
    load.to = loopback_port(to);
    if (load.units < load.sessions && !load.hold)
        load.sessions = (unsigned)load.units;
    script();

    /* Every session may still end a unit that it began just before the limit. */
    load.latencies_us = allocate(load.units + load.sessions + 1, sizeof *load.latencies_us);
    load.all = allocate(load.sessions, sizeof *load.all);
    load.epoll = epoll_create1(EPOLL_CLOEXEC);
    if (load.hold) {
        fcntl(STDIN_FILENO, F_SETFL, O_NONBLOCK);
        watch(load.epoll, EPOLL_CTL_ADD, STDIN_FILENO, EPOLLIN, NULL);
    }
    load.start_ns = now_ns();
    load.end_ns = load.start_ns + (int64_t)(load.seconds * 1e9);

    /* At most this many connections wait for their greeting at once: no listen queue overflows, no SYN is resent. */
    unsigned opened = 0, opening_max = load.sessions < 100 ? load.sessions : 100;
    int64_t last_ns = load.start_ns, swept_ns = load.start_ns;
    bool reported = false;
    for (unsigned i = 0; i < load.sessions; i++)
        load.all[i].fd = -1;

    for (;;) {
        int64_t now = now_ns();
        unsigned greeted = 0;
        if (opened < load.sessions) {
            for (unsigned i = 0; i < opened; i++)
                greeted += load.all[i].fd < 0 || load.all[i].step >= 0 || load.all[i].held;
            while (opened < load.sessions && opened - greeted < opening_max && (load.hold || more_units(now)))
                session_begin(&load.all[opened++], now);
        }
        if (load.hold) {
            if (!reported && (load.held + load.lost >= load.sessions || now >= load.end_ns)) {
                printf("{\"held\": %u}\n", load.held);
                fflush(stdout);
                reported = true;
            }
        } else if (load.living == 0 && (opened == load.sessions || !more_units(now)))
            break;

        struct epoll_event events[EVENTS];
        int happened = epoll_wait(load.epoll, events, EVENTS, 200);
        for (int i = 0; i < happened; i++) {
            struct session *session = events[i].data.ptr;
            if (session == NULL) {
                if (!stdin_ended())
                    continue;
                printf("{\"held\": %u}\n", load.held);
                fflush(stdout);
                for (unsigned j = 0; j < opened; j++)
                    if (load.all[j].fd >= 0)
                        (void)!send(load.all[j].fd, "QUIT\r\n", 6, MSG_NOSIGNAL);
                return 0;
            }
            if (session->writing && events[i].events & EPOLLOUT)
                session_write(session);
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR) && !session_read(session)) {
                last_ns = now_ns();
                if (!load.hold && more_units(last_ns))
                    session_begin(session, last_ns);
            }
        }
        if (!load.hold && now - swept_ns > 500000000) {
            swept_ns = now;
            for (unsigned i = 0; i < opened; i++)
                if (load.all[i].fd >= 0 && now > load.all[i].deadline_ns)
                    failed(&load.all[i], "no reply in time");
        }
    }

    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    qsort(load.latencies_us, load.units_done, sizeof *load.latencies_us, ascending);
    printf("{\"units\": %ju, \"messages\": %ju, \"connections\": %ju, \"elapsed_s\": %.6f, \"p50_ms\": %.3f, "
           "\"p90_ms\": %.3f, \"p99_ms\": %.3f, \"max_ms\": %.3f, \"cpu_s\": %.6f, \"size_octets\": %zu}\n",
           (uintmax_t)load.units_done, (uintmax_t)load.messages, (uintmax_t)load.connections,
           (double)(last_ns - load.start_ns) / 1e9, latency_ms(0.50), latency_ms(0.90), latency_ms(0.99),
           latency_ms(1.0),
           (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
               (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6,
           load.size);
    return 0;
}

int main(int count, char **arguments) {
    prepare();
    if (count >= 2 && strcmp(arguments[1], "sink") == 0)
        return run_sink(count - 2, arguments + 2);
    if (count >= 2 && strcmp(arguments[1], "load") == 0)
        return run_load(count - 2, arguments + 2);
    die("usage: load sink ... | load load ...");
}
