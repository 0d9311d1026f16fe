// Helpers: threads that stay for a moment after a call. A model's layers are attended over one right after the other,
// and starting a thread for each takes longer (20 to 50 us) than it saves. An embedded store keeps no pool behind its
// user's back, though: a helper without work ends soon, and before a fork all are sent home.
//
// A thread in which a model is run has a team already, OpenMP's, whose threads spin for the next operation and would
// contend with helpers for the processors. Such a thread can tell the core to give its work to that team.
#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sched.h>
#include <signal.h>

namespace kvmmap {
namespace {

using Clock = std::chrono::steady_clock;

// How long a helper looks out for the next call before it sleeps (waking it takes some 20 us), and how long it sleeps
// before it ends.
constexpr auto lookout = std::chrono::microseconds(100);
constexpr auto linger = std::chrono::milliseconds(50);

// The entry of an OpenMP runtime that compilers call for a parallel region (GCC's; LLVM's has it as well).
using Fork = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

// The team of the calling thread. Asking for another number of threads than the team has would have it made anew.
struct Team {
    Fork fork = nullptr;
    unsigned threads = 0;
};

thread_local Team team;

// What one call wants done; lives as long as that.
struct Call {
    void (*body)(void* context, int64_t piece);
    void* context;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::mutex failing{};
    std::exception_ptr failure{};

    void work() {
        try {
            for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, piece);
        } catch (...) {
            next = count;
            const std::lock_guard<std::mutex> lock(failing);
            if (!failure) failure = std::current_exception();
        }
    }
};

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int current_processor() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;  // not to be known
#endif
}

// Waits for a moment, leaving the processor to others. Returns whether `done`.
template <class Done>
bool look_out(Done&& done) {
    for (const auto start = Clock::now(); !done();) {
        if (Clock::now() - start > lookout) return false;
        for (int i = 0; i < 32 && !done(); ++i) relax();
        std::this_thread::yield();
    }
    return true;
}

// Who works for a caller: free -> asked (by the caller) -> busy (it has come) -> free. From `asked`, the caller may take
// it back.
class Helper {
public:
    enum class State { free, asked, busy, dismissed };

    // Throws std::system_error where there is no thread to be had (a process limit).
    explicit Helper(Call& call) : call_(&call), thread_([this] { live(); }) {}

    void ask(Call& call) {
        call_ = &call;
        tell(State::asked);
    }

    // Has it run elsewhere than on a processor, the caller's own. The system may well wake a thread where its waker runs,
    // and take milliseconds to find it a better place: a guest of KVM takes idle processors for busy ones.
    void keep_off([[maybe_unused]] int processor) {
#if defined(__linux__)
        if (processor < 0 || processor == kept_off_) return;
        cpu_set_t others;
        if (sched_getaffinity(0, sizeof others, &others)) return;
        CPU_CLR(processor, &others);
        if (CPU_COUNT(&others) && !pthread_setaffinity_np(thread_.native_handle(), sizeof others, &others))
            kept_off_ = processor;
#endif
    }

    // Returns once this helper has nothing to do with the call any more.
    void part() {
        State expected = State::asked;
        if (state_.compare_exchange_strong(expected, State::free)) return;
        auto free = [this] { return state_.load(std::memory_order_acquire) == State::free; };
        if (look_out(free)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, free);
    }

    // Ends it; it must be free.
    void dismiss() {
        tell(State::dismissed);
        thread_.join();
    }

    Helper* next = nullptr;  // in the list of those without work

private:
    void tell(State state) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            state_ = state;
        }
        changed_.notify_one();
    }

    // Returns false if nobody had work for long.
    bool await_call() {
        auto told = [this] { return state_.load(std::memory_order_acquire) != State::free; };
        if (look_out(told)) return true;
        std::unique_lock<std::mutex> lock(mutex_);
        return changed_.wait_for(lock, linger, told);
    }

    void live();

    std::atomic<State> state_{State::asked};
    Call* call_;
    int kept_off_ = -1;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::thread thread_;  // the last member: it uses the others
};

// The helpers without work, the latest first.
struct Bench {
    std::mutex mutex;
    Helper* first = nullptr;

    Helper* take() {
        const std::lock_guard<std::mutex> lock(mutex);
        Helper* helper = first;
        if (helper) first = helper->next;
        return helper;
    }

    void put(Helper* helper) {
        const std::lock_guard<std::mutex> lock(mutex);
        helper->next = first;
        first = helper;
    }

    bool remove(Helper* helper) {
        const std::lock_guard<std::mutex> lock(mutex);
        for (Helper** at = &first; *at; at = &(*at)->next) {
            if (*at != helper) continue;
            *at = helper->next;
            return true;
        }
        return false;
    }
};

Bench* bench_of_process;

// A child of a fork has none of its parent's threads, and whatever those left locked is left behind.
Bench& bench() {
    static const int registered = [] {
        bench_of_process = new Bench;
        return pthread_atfork(
            [] {
                while (Helper* helper = bench_of_process->take()) {
                    helper->dismiss();
                    delete helper;
                }
            },
            nullptr, [] { bench_of_process = new Bench; team = {}; });
    }();
    static_cast<void>(registered);
    return *bench_of_process;
}

void Helper::live() {
    // Signals are for the program's own threads, but for those that tell of what this one did.
    sigset_t others;
    sigfillset(&others);
    for (int own : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&others, own);
    pthread_sigmask(SIG_BLOCK, &others, nullptr);
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "kvmmap");
#endif
    for (;;) {
        State expected = State::asked;
        if (state_.compare_exchange_strong(expected, State::busy)) {
            call_->work();
            tell(State::free);
        } else if (expected == State::dismissed) {
            return;
        } else if (!await_call() && bench().remove(this)) {
            thread_.detach();
            delete this;
            return;
        }
    }
}

}  // namespace

void use_team(uintptr_t fork, int threads) {
    bench();  // a child of a fork has no team
    team = threads > 1 ? Team{reinterpret_cast<Fork>(fork), static_cast<unsigned>(threads)} : Team{};
}

void run_pieces(int64_t count, int threads, void (*body)(void* context, int64_t piece), void* context) {
    Call call{body, context, count};
    std::vector<Helper*> helpers;
    const int64_t wanted = std::min<int64_t>(threads, count) - 1;
    if (wanted > 0 && team.fork) {
        struct Share {
            Call& call;
            std::atomic<int64_t> left;
        } share{call, {wanted + 1}};
        team.fork(
            [](void* shared) {
                auto& mine = *static_cast<Share*>(shared);
                if (mine.left.fetch_sub(1, std::memory_order_relaxed) > 0) mine.call.work();
            },
            &share, team.threads, 0);
        call.work();  // nothing is left, unless fewer threads came
        if (call.failure) std::rethrow_exception(call.failure);
        return;
    }
    if (wanted > 0) helpers.reserve(wanted);
    const int processor = wanted > 0 ? current_processor() : -1;
    for (int64_t i = 0; i < wanted; ++i) {
        Helper* helper = bench().take();
        if (helper) {
            helper->keep_off(processor);
            helper->ask(call);
        } else {
            try {
                helper = new Helper(call);
            } catch (const std::exception&) {
                break;  // no thread, or no memory, to be had: fewer helpers, then
            }
            helper->keep_off(processor);
        }
        helpers.push_back(helper);
    }
    call.work();
    for (Helper* helper : helpers) {
        helper->part();
        bench().put(helper);
    }
    if (call.failure) std::rethrow_exception(call.failure);
}

}  // namespace kvmmap
